"""A checkpoint of random weights in the Hugging Face layout, that flexport and its peers share.

The shapes are a published model's, the numbers random: speed depends on neither text nor weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flexport.checkpoint.dummy import DummyKind, write_dummy
from flexport.errors import UsageError
from flexport.models import known_config, spec_of
from flexport.models.tensors import TensorSpec, owned_tensors

__all__ = ["SHAPES", "WEIGHTS_NAME", "shapes_of", "shared_checkpoint"]

SHAPES: Mapping[str, Mapping[str, Any]] = {
    # About 1.3 billion parameters, of which a token passes 260 million.
    "small-experts": {
        "model_type": "qwen3_moe", "vocab_size": 32000, "hidden_size": 1024,
        "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 64, "intermediate_size": 3072, "moe_intermediate_size": 768,
        "num_experts": 32, "num_experts_per_tok": 4, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False,
        "hidden_act": "silu", "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip
"""Shapes that nobody has published, of a size that a CPU runs in a minute."""

WEIGHTS_NAME = "model.safetensors"
_SEED = 0


def shared_checkpoint(
    model: str, dtype: str, directory: Path, say: Callable[[str], None] = lambda _: None
) -> Path:
    """A directory below `directory` with config and weights, written if it is not there yet."""
    config = shapes_of(model)
    target = directory / f"{model.replace('/', '--')}-{dtype}"
    weights = target / WEIGHTS_NAME
    if weights.is_file():  # it is put there whole, and last
        return target
    say(f"writing random weights in the shapes of {model} to {target}")
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2)
    (target / "config.json").write_text(text, encoding="utf-8")
    spec = spec_of(config)
    wanted = {
        t.names[0]: (t.names[0], t.file_shape, _kind(t))
        for layer in range(spec.num_schedule_layers)
        for t in owned_tensors(spec, layer)
    }
    write_dummy(weights, list(wanted.values()), dtype, _SEED)
    return target


def shapes_of(model: str) -> Mapping[str, Any]:
    """The config of a model known by name; raises UsageError."""
    config = SHAPES.get(model) or known_config(model)
    if config is None:
        raise UsageError(
            f"no shapes are known of {model!r}; known are {', '.join(SHAPES)} and what `flexport "
            "models` lists"
        )
    return config


def _kind(tensor: TensorSpec) -> DummyKind:
    if tensor.kind == "norm" and tensor.slot.endswith(".weight"):
        return "norm"
    return "bias" if tensor.kind in ("norm", "bias") else "matrix"

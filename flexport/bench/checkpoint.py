"""A checkpoint of random weights in the Hugging Face layout, that flexport and its peers share.

The shapes are a published model's, the numbers random: speed depends on neither text nor weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flexport.checkpoint.dummy import DummyKind, write_dummy
from flexport.errors import UsageError
from flexport.models import known_config, spec_of
from flexport.models.spec import TensorSpec, owned_tensors

__all__ = ["WEIGHTS_NAME", "shared_checkpoint"]

WEIGHTS_NAME = "model.safetensors"
_SEED = 0


def shared_checkpoint(
    model: str, dtype: str, directory: Path, say: Callable[[str], None] = lambda _: None
) -> Path:
    """A directory below `directory` with config and weights, written if it is not there yet."""
    config = known_config(model)
    if config is None:
        raise UsageError(f"no shapes are known of {model!r}; `flexport models` lists those known")
    target = directory / f"{model.replace('/', '--')}-{dtype}"
    weights = target / WEIGHTS_NAME
    if weights.is_file():  # it is put there whole, and last
        return target
    say(f"writing random weights in the shapes of {model} to {target}")
    target.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2)
    (target / "config.json").write_text(text, encoding="utf-8")
    spec = spec_of(config)
    wanted = [t for layer in range(spec.num_schedule_layers) for t in owned_tensors(spec, layer)]
    write_dummy(weights, [(t.names[0], t.shape, _kind(t)) for t in wanted], dtype, _SEED)
    return target


def _kind(tensor: TensorSpec) -> DummyKind:
    if tensor.kind == "norm" and tensor.slot.endswith(".weight"):
        return "norm"
    return "matrix" if tensor.kind in ("matrix", "table") else "bias"

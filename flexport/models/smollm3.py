"""SmolLM 3 (`model_type` "smollm3"): Llama of which every fourth layer knows no positions.

Those layers alone may have a window. Source: the model card of HuggingFaceTB's SmolLM3-3B,
arXiv:2501.18795, and the fields of transformers' SmolLM3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import (
    all_but_every,
    read_attention,
    read_mlp,
    read_norm,
    read_windows,
)
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 2e6,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "pad_token_id": 128004,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a SmolLM3 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("smollm3", config, _DEFAULTS)
    attention, mlp = read_attention(fields), read_mlp(fields)
    turns = _which_turn(fields)
    in_use = fields.flag("use_sliding_window", False)
    window = fields.count_or_none("sliding_window") if in_use else None
    windows = read_windows(fields, window, lambda layer: not turns[layer])
    layers = [
        Layer(
            attention=replace(attention, window=own, rope=attention.rope if turn else None),
            mlp=mlp,
        )
        for turn, own in zip(turns, windows, strict=True)
    ]
    return build_model(fields, layers, read_norm(fields))


def _which_turn(fields: Config) -> list[bool]:
    """Whether each layer turns; no_rope_layers has a 1 for those that do."""
    num_layers = fields.count("num_hidden_layers")
    turns = all_but_every(fields.count("no_rope_layer_interval"))
    listed = fields.ints("no_rope_layers", [int(turns(i)) for i in range(num_layers)])
    if len(listed) != num_layers or not set(listed) <= {0, 1}:
        raise fields.unsupported(f"no_rope_layers is {listed}", f"a 0 or 1 for {num_layers} layers")
    return [bool(turn) for turn in listed]

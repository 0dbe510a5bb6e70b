"""EXAONE 4 (`model_type` "exaone4"): OLMo 2 with norms head by head, and windows in the 32B.

There, every fourth layer sees the whole row and knows no positions. Source: arXiv:2507.11407, and
the fields of transformers' Exaone4Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import olmo2
from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import (
    all_but_every,
    read_attention,
    read_mlp,
    read_norm,
    read_windows,
)
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
    "bos_token_id": 0,
    "eos_token_id": 2,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an EXAONE 4 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("exaone4", config, _DEFAULTS)
    norm, mlp = read_norm(fields), read_mlp(fields)
    near = replace(read_attention(fields), head_norm=HeadNorm(norm=norm, over="head"))
    window = fields.count_or_none("sliding_window")
    full = near if window is None else replace(near, rope=None)
    # With layer_types, the pattern may be a word.
    listed = window is None or fields.has("layer_types")
    slides = all_but_every(1 if listed else fields.count("sliding_window_pattern"))
    layers = [
        Layer(attention=full if own is None else replace(near, window=own), mlp=mlp, norms="output")
        for own in read_windows(fields, window, slides)
    ]
    return build_model(fields, layers, norm, olmo2.PARTS)

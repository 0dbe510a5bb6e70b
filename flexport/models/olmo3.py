"""OLMo 3 (`model_type` "olmo3"): OLMo 2 with windows, and a scaling of what turns without one.

Every fourth layer sees the whole row. Source: arXiv:2512.13961, and the fields of transformers'
Olmo3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import olmo2
from flexport.models.config import Config
from flexport.models.like_llama import (
    FULL,
    SLIDING,
    all_but_every,
    build_model,
    read_attention,
    read_mlp,
    read_norm,
    read_turn,
    read_windows,
)
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {**olmo2.DEFAULTS, "rope_theta": 5e5, "sliding_window": 4096}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an Olmo3 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("olmo3", config, _DEFAULTS)
    norm, mlp = read_norm(fields, wide=True), read_mlp(fields)
    full = replace(
        read_attention(fields, read_turn(fields, layer_type=FULL)),
        head_norm=HeadNorm(norm=norm, over="all"),
    )
    near_rope = read_turn(fields, layer_type=SLIDING)
    windows = read_windows(fields, fields.count_or_none("sliding_window"), all_but_every(4))
    layers = [
        Layer(
            attention=full if own is None else replace(full, window=own, rope=near_rope),
            mlp=mlp,
            norms="output",
        )
        for own in windows
    ]
    return build_model(fields, layers, norm, olmo2.PARTS)

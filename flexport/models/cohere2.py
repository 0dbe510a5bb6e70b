"""Command R7B and A (`model_type` "cohere2"): Command R with windows.

Every fourth layer sees the whole row, and knows no positions. Source: arXiv:2504.00698, and the
fields of transformers' Cohere2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import cohere
from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import (
    all_but_every,
    read_attention,
    read_mlp,
    read_turn,
    read_windows,
)
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    **cohere.DEFAULTS,
    "rope_theta": 1e4,
    "sliding_window": 4096,
    "sliding_window_pattern": 4,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Cohere2 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("cohere2", config, _DEFAULTS)
    cohere.refuse_other_designs(fields)
    fields.refuse_unless("use_qk_norm", False)
    near = read_attention(fields, read_turn(fields, interleaved=True))
    full = replace(near, rope=None)
    mlp = read_mlp(fields)
    windows = read_windows(
        fields,
        fields.count_or_none("sliding_window"),
        all_but_every(fields.count("sliding_window_pattern")),
    )
    layers = [
        Layer(
            attention=full if own is None else replace(near, window=own),
            mlp=mlp,
            parallel="one norm",
        )
        for own in windows
    ]
    model = build_model(fields, layers, cohere.read_cohere_norm(fields))
    return replace(model, logit_scale=fields.number("logit_scale"))

"""Ministral 3 (`model_type` "ministral3"): Mistral whose queries grow with their position.

A query at position p is multiplied by 1 + beta * log(1 + floor(p / n)), where n is the length before
YaRN. Source: arXiv:2601.08584, and the fields of transformers' Ministral3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm, read_turn
from flexport.models.rope import rope_fields
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 131072,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 34,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "original_max_position_embeddings": 16384,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "llama_4_scaling_beta": 0.1,
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 11,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Ministral 3 config; raises UnsupportedModel for what flexport can't run."""
    fields = Config("ministral3", config, _DEFAULTS)
    rope, given = read_turn(fields), rope_fields(fields)
    length = given.count("original_max_position_embeddings")
    growth = (given.number("llama_4_scaling_beta"), length)
    attention = replace(
        read_attention(fields, rope),
        query_rope=replace(rope, growth=growth),
        window=fields.count_or_none("sliding_window"),
    )
    layer = Layer(attention=attention, mlp=read_mlp(fields))
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), read_norm(fields))

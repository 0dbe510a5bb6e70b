"""Seed-OSS (`model_type` "seed_oss"): Llama with biases on queries, keys and values.

Source: the model card of ByteDance-Seed's Seed-OSS-36B, and the fields of transformers'
SeedOssConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 155136,
    "hidden_size": 4096,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 80,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 524288,
    "rms_norm_eps": 1e-6,
    "attention_bias": True,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Seed-OSS config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("seed_oss", config, _DEFAULTS)
    attention = replace(read_attention(fields), out_bias=fields.flag("attention_out_bias", False))
    layer = Layer(attention=attention, mlp=read_mlp(fields))
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), read_norm(fields))

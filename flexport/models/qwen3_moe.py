"""Qwen3-30B-A3B and its kin (`model_type` "qwen3_moe").

Experts without a shared one, and a norm of each query and key. Source: arXiv:2505.09388, section 2,
and the fields of transformers' Qwen3MoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_norm
from flexport.models.naming import EXPERT_PARTS
from flexport.models.qwen2_moe import read_mlps
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}

_FIELDS = {"num_local_experts": "num_experts"}
"""As transformers 5 writes it, and as configs are published."""


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen3-MoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("qwen3_moe", config, _DEFAULTS, also=_FIELDS)
    norm = read_norm(fields)
    slides = fields.flag("use_sliding_window", False)
    attention = replace(
        read_attention(fields),
        head_norm=HeadNorm(norm=norm, over="head"),
        window=fields.count_or_none("sliding_window") if slides else None,
    )
    layers = [Layer(attention=attention, mlp=mlp) for mlp in read_mlps(fields)]
    return build_model(fields, layers, norm, EXPERT_PARTS)

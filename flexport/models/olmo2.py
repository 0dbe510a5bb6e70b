"""OLMo 2 (`model_type` "olmo2"): Llama with its norms behind each half, and of queries and keys.

Queries and keys are normed over all heads together. Source: arXiv:2501.00656, and the fields of
transformers' Olmo2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["DEFAULTS", "PARTS", "spec"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}

PARTS: Mapping[str, str] = {
    **LLAMA_PARTS,
    "attention_out_norm": "layers.{i}.post_attention_layernorm",
    "mlp_out_norm": "layers.{i}.post_feedforward_layernorm",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an Olmo2 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("olmo2", config, DEFAULTS)
    fields.refuse_unless("clip_qkv", None)
    norm = read_norm(fields, wide=True)
    attention = replace(read_attention(fields), head_norm=HeadNorm(norm=norm, over="all"))
    layer = Layer(attention=attention, mlp=read_mlp(fields), norms="output")
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), norm, PARTS)

"""GLM-4 9B (`model_type` "glm"): Llama with biases on queries, keys and values, and a fused MLP.

Half of a head's features turn, neighbours together. Source: arXiv:2406.12793, and the fields of
transformers' GlmConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm, read_turn
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import Layer, ModelSpec

__all__ = ["DEFAULTS", "PARTS", "read_glm_layer", "spec"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "eos_token_id": [151329, 151336, 151338],
    "pad_token_id": 151329,
}

PARTS: Mapping[str, str] = {**LLAMA_PARTS, "gate_up": "layers.{i}.mlp.gate_up_proj"}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GLM config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("glm", config, DEFAULTS)
    layers = [read_glm_layer(fields)] * fields.count("num_hidden_layers")
    return build_model(fields, layers, read_norm(fields), PARTS)


def read_glm_layer(fields: Config) -> Layer:
    """A layer, with norms before its halves."""
    attention = read_attention(fields, read_turn(fields, interleaved=True))
    return Layer(
        attention=replace(attention, out_bias=False),
        mlp=replace(read_mlp(fields), fused="halves"),
    )

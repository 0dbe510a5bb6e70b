"""Arcee's AFM (`model_type` "arcee"): Llama with a plain MLP and squared ReLU.

Source: the model card of arcee-ai's AFM-4.5B, and the fields of transformers' ArceeConfig.
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
    "vocab_size": 32000,
    "hidden_size": 2560,
    "intermediate_size": 18432,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "relu2",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an Arcee config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("arcee", config, _DEFAULTS)
    layer = Layer(attention=read_attention(fields), mlp=replace(read_mlp(fields), gated=False))
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), read_norm(fields))

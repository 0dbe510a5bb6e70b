"""Llama 1 to 3, and all that came to be saved under its name (`model_type` "llama").

Source: arXiv:2302.13971, arXiv:2407.21783, and the fields of transformers' LlamaConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Llama config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("llama", config, _DEFAULTS)
    layer = Layer(attention=read_attention(fields), mlp=read_mlp(fields))
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), read_norm(fields))

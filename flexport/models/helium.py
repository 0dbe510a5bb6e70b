"""Helium 1 (`model_type` "helium"): Llama of which neighbouring features turn together.

Source: the model card of kyutai's helium-1-preview, and the fields of transformers' HeliumConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm, read_turn
from flexport.models.spec import Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 48000,
    "hidden_size": 2560,
    "intermediate_size": 7040,
    "num_hidden_layers": 24,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-8,
    "rope_theta": 1e5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Helium config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("helium", config, _DEFAULTS)
    attention = read_attention(fields, read_turn(fields, interleaved=True))
    layer = Layer(attention=replace(attention, out_bias=False), mlp=read_mlp(fields))
    return build_model(
        fields, [layer] * fields.count("num_hidden_layers"), read_norm(fields, wide=True)
    )

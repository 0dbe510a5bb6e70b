"""Granite 3 (`model_type` "granite"): Llama with four multipliers.

Of embeddings, of query-key products, of each half before it is added, and a divisor of logits.
Source: the model cards of ibm-granite's granite-3.0, and the fields of transformers' GraniteConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.spec import Layer, ModelSpec

__all__ = ["MULTIPLIERS", "multiplied", "spec"]

MULTIPLIERS: Mapping[str, Any] = {
    "embedding_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
}
"""Where a config does not have them."""

_DEFAULTS: Mapping[str, Any] = {
    **MULTIPLIERS,
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
    """The spec of a Granite config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("granite", config, _DEFAULTS)
    layer = Layer(attention=read_attention(fields), mlp=read_mlp(fields))
    layers = [layer] * fields.count("num_hidden_layers")
    return multiplied(fields, build_model(fields, layers, read_norm(fields)))


def multiplied(fields: Config, model: ModelSpec) -> ModelSpec:
    """The same with the four multipliers, of which attention's is in place of its scale."""
    scale = fields.number("attention_multiplier")
    layers = tuple(
        replace(layer, attention=replace(layer.attention, scale=scale)) for layer in model.layers
    )
    return replace(
        model,
        layers=layers,
        embed_scale=fields.number("embedding_multiplier"),
        residual_scale=fields.number("residual_multiplier"),
        logit_scale=1 / fields.number("logits_scaling"),
    )

"""Mistral (`model_type` "mistral"): Llama with a window of tokens.

One window for all layers, none where the config says null; published configs with layer_types mean
those. Source: arXiv:2310.06825, and the fields of transformers' MistralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm, read_windows
from flexport.models.spec import Layer, ModelSpec

__all__ = ["DEFAULTS", "read_mistral", "spec"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Mistral config; raises UnsupportedModel for what flexport does not know."""
    return read_mistral(Config("mistral", config, DEFAULTS))


def read_mistral(fields: Config) -> ModelSpec:
    """The same, of the fields of another family's config."""
    attention, mlp = read_attention(fields), read_mlp(fields)
    windows = read_windows(fields, fields.count_or_none("sliding_window"), lambda _: True)
    layers = [Layer(attention=replace(attention, window=own), mlp=mlp) for own in windows]
    return build_model(fields, layers, read_norm(fields))

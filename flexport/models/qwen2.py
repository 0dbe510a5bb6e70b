"""Qwen 2 and 2.5 (`model_type` "qwen2"): Llama with biases on queries, keys and values.

From max_window_layers on, layers may have a window. Source: arXiv:2407.10671, and the fields of
transformers' Qwen2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm, read_windows
from flexport.models.spec import Layer, ModelSpec

__all__ = ["DEFAULTS", "read_qwen2", "read_qwen_windows", "spec"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen2 config; raises UnsupportedModel for what flexport does not know."""
    return read_qwen2(Config("qwen2", config, DEFAULTS))


def read_qwen2(fields: Config) -> ModelSpec:
    """The same, of the fields of a config with other defaults."""
    attention = replace(read_attention(fields), bias=True, out_bias=False)
    mlp = read_mlp(fields)
    layers = [
        Layer(attention=replace(attention, window=own), mlp=mlp)
        for own in read_qwen_windows(fields)
    ]
    return build_model(fields, layers, read_norm(fields))


def read_qwen_windows(fields: Config) -> list[int | None]:
    """Each layer's window; sliding_window counts only with use_sliding_window."""
    first = fields.count("max_window_layers", least=0)
    in_use = fields.flag("use_sliding_window", False)
    window = fields.count_or_none("sliding_window") if in_use else None
    return read_windows(fields, window, lambda layer: layer >= first)

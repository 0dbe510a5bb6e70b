"""Qwen 3 (`model_type` "qwen3"): Llama with norms of queries and keys, head by head.

It has windows where Qwen2 has them. Source: arXiv:2505.09388, and the fields of transformers'
Qwen3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import qwen2
from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_norm
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["DEFAULTS", "read_qwen3", "spec"]

DEFAULTS: Mapping[str, Any] = {**qwen2.DEFAULTS, "head_dim": 128}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen3 config; raises UnsupportedModel for what flexport does not know."""
    return read_qwen3(Config("qwen3", config, DEFAULTS))


def read_qwen3(fields: Config) -> ModelSpec:
    """The same, of the fields of a config with other defaults."""
    norm, mlp = read_norm(fields), read_mlp(fields)
    attention = replace(read_attention(fields), head_norm=HeadNorm(norm=norm, over="head"))
    layers = [
        Layer(attention=replace(attention, window=own), mlp=mlp)
        for own in qwen2.read_qwen_windows(fields)
    ]
    return build_model(fields, layers, norm)

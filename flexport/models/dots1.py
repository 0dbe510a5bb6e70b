"""dots.llm1 (`model_type` "dots1").

DeepSeek-V3's experts behind grouped heads with a norm of each query and key. Source:
arXiv:2506.05767, section 2.1, and the fields of transformers' Dots1Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_deepseek import read_balanced_experts, read_layers
from flexport.models.like_llama import build_model, read_attention, read_norm, read_windows
from flexport.models.naming import EXPERT_PARTS
from flexport.models.spec import HeadNorm, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 4608,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "max_window_layers": 62,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a dots.llm1 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("dots1", config, _DEFAULTS)
    norm = read_norm(fields)
    attention = replace(read_attention(fields), head_norm=HeadNorm(norm=norm, over="head"))
    first = fields.count("max_window_layers", least=0)
    windows = read_windows(
        fields, fields.count_or_none("sliding_window"), lambda layer: layer >= first
    )
    layers = [
        replace(layer, attention=replace(attention, window=window))
        for layer, window in zip(
            read_layers(fields, attention, read_balanced_experts(fields)), windows, strict=True
        )
    ]
    return build_model(fields, layers, norm, EXPERT_PARTS)

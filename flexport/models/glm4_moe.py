"""GLM-4.5 to 4.7 (`model_type` "glm4_moe").

DeepSeek-V3's experts behind grouped heads, of which half the features turn. Source:
arXiv:2508.06471, section 2.1, and the fields of transformers' Glm4MoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_deepseek import read_balanced_experts, read_layers, unused_layers
from flexport.models.like_llama import build_model, read_attention, read_norm
from flexport.models.naming import EXPERT_PARTS
from flexport.models.spec import HeadNorm, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 131072,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-5,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GLM-4-MoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("glm4_moe", config, _DEFAULTS)
    norm = read_norm(fields)
    has_head_norm = fields.flag("use_qk_norm", False)
    attention = replace(
        read_attention(fields),
        out_bias=False,
        head_norm=HeadNorm(norm=norm, over="head") if has_head_norm else None,
    )
    layers = read_layers(fields, attention, read_balanced_experts(fields))
    model = build_model(fields, layers, norm, EXPERT_PARTS)
    return replace(model, unused=unused_layers(fields))

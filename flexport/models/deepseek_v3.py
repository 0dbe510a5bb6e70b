"""DeepSeek-V3 and R1, and what was made like them (`model_type` "deepseek_v3").

Latent attention, and experts picked by sigmoids, from the best groups of them. Source:
arXiv:2412.19437, section 2.1, and the fields of transformers' DeepseekV3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_deepseek import (
    latent_parts,
    read_balanced_experts,
    read_latent_attention,
    read_layers,
    unused_layers,
)
from flexport.models.like_llama import build_model, read_norm
from flexport.models.spec import ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a DeepSeek-V3 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("deepseek_v3", config, _DEFAULTS)
    fields.refuse_unless("scoring_func", "sigmoid")
    fields.refuse_unless("topk_method", "noaux_tc")
    interleaved = fields.flag("rope_interleave", True)
    attention = read_latent_attention(fields, interleaved=interleaved)
    layers = read_layers(fields, attention, read_balanced_experts(fields))
    model = build_model(fields, layers, read_norm(fields), latent_parts(attention))
    return replace(model, unused=unused_layers(fields))

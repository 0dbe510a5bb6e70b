"""DeepSeek-V2, -V2-Lite and -Coder-V2 (`model_type` "deepseek_v2").

Latent attention, and experts picked by softmax from the best groups of them, or of all. Source:
arXiv:2405.04434, section 2, and the fields of transformers' DeepseekV2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_deepseek import (
    latent_parts,
    read_experts,
    read_latent_attention,
    read_layers,
)
from flexport.models.like_llama import build_model, read_norm
from flexport.models.spec import ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "first_k_dense_replace": 0,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_METHODS = {"greedy": False, "group_limited_greedy": True}
"""Whether experts are picked from the best groups."""


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a DeepSeek-V2 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("deepseek_v2", config, _DEFAULTS)
    fields.refuse_unless("scoring_func", "softmax")
    # DeepSeek's own code and transformers' differ in what it means here; no model has it.
    fields.refuse_unless("norm_topk_prob", False)
    experts = read_experts(fields)
    if fields.choice("topk_method", "greedy", _METHODS):
        experts = replace(
            experts, num_groups=fields.count("n_group"), top_groups=fields.count("topk_group")
        )
    attention = read_latent_attention(fields, interleaved=True)
    layers = read_layers(fields, attention, experts)
    return build_model(fields, layers, read_norm(fields), latent_parts(attention))

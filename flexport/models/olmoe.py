"""OLMoE (`model_type` "olmoe").

All of a token's queries are normed together, and so are its keys; what is projected may be clipped.
Source: arXiv:2409.02060, and the fields of transformers' OlmoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import EXPERT_PARTS
from flexport.models.spec import Experts, HeadNorm, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "intermediate_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "eos_token_id": 50279,
    "pad_token_id": 1,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an OLMoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("olmoe", config, _DEFAULTS)
    norm = read_norm(fields)
    attention = replace(
        read_attention(fields),
        head_norm=HeadNorm(norm=norm, over="all"),
        clip=fields.number_or_none("clip_qkv"),
    )
    experts = Experts(
        num_experts=fields.count("num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=read_mlp(fields),
        normalised=fields.flag("norm_topk_prob", False),
    )
    layers = [Layer(attention=attention, mlp=experts)] * fields.count("num_hidden_layers")
    return build_model(fields, layers, norm, EXPERT_PARTS)

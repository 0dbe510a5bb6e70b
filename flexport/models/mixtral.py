"""Mixtral (`model_type` "mixtral"): Llama's layers with experts in place of MLPs.

Each token passes the best two of eight; their scores are divided by their sum. Source:
arXiv:2401.04088, and the fields of transformers' MixtralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import Experts, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PARTS = {
    **LLAMA_PARTS,
    "router": "layers.{i}.block_sparse_moe.gate",
    "expert_gate": "layers.{i}.block_sparse_moe.experts.{e}.w1",
    "expert_down": "layers.{i}.block_sparse_moe.experts.{e}.w2",
    "expert_up": "layers.{i}.block_sparse_moe.experts.{e}.w3",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Mixtral config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("mixtral", config, _DEFAULTS)
    attention = replace(read_attention(fields), window=fields.count_or_none("sliding_window"))
    experts = Experts(
        num_experts=fields.count("num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=read_mlp(fields),
    )
    layers = [Layer(attention=attention, mlp=experts)] * fields.count("num_hidden_layers")
    return build_model(fields, layers, read_norm(fields), _PARTS)

"""Granite 3's small experts (`model_type` "granitemoe").

Granite's four multipliers, and experts whose matrices are one tensor a layer. Source: the fields of
transformers' GraniteMoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.granite import MULTIPLIERS, multiplied
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import Experts, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    **MULTIPLIERS,
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PARTS = {
    **LLAMA_PARTS,
    "router": "layers.{i}.block_sparse_moe.router.layer",
    "expert_gate_up": "layers.{i}.block_sparse_moe.input_linear",
    "expert_down": "layers.{i}.block_sparse_moe.output_linear",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Granite-MoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("granitemoe", config, _DEFAULTS)
    experts = Experts(
        num_experts=fields.count("num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=replace(read_mlp(fields), fused="halves"),
        stacked=True,
    )
    layer = Layer(attention=read_attention(fields), mlp=experts)
    layers = [layer] * fields.count("num_hidden_layers")
    return multiplied(fields, build_model(fields, layers, read_norm(fields), _PARTS))

"""Qwen1.5-MoE and Qwen2-57B-A14B (`model_type` "qwen2_moe").

Many small experts, and one larger that every token passes, through a gate of its own. Some layers
may have an MLP in place of experts. Source: arXiv:2407.10671, section 2.2.2, and the fields of
transformers' Qwen2MoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import (
    build_model,
    read_attention,
    read_mlp,
    read_norm,
    read_windows,
)
from flexport.models.naming import EXPERT_PARTS
from flexport.models.spec import Experts, Layer, Mlp, ModelSpec

__all__ = ["read_mlps", "spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}

_PARTS = {
    **EXPERT_PARTS,
    "shared_gate": "layers.{i}.mlp.shared_expert.gate_proj",
    "shared_up": "layers.{i}.mlp.shared_expert.up_proj",
    "shared_down": "layers.{i}.mlp.shared_expert.down_proj",
    "shared_router": "layers.{i}.mlp.shared_expert_gate",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Qwen2-MoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("qwen2_moe", config, _DEFAULTS)
    attention = replace(read_attention(fields), bias=fields.flag("qkv_bias", True), out_bias=False)
    shared = replace(read_mlp(fields), size=fields.count("shared_expert_intermediate_size"))
    layers = [
        Layer(attention=replace(attention, window=window), mlp=mlp)
        for window, mlp in zip(
            _windows(fields),
            read_mlps(fields, shared=shared, shared_gate=True),
            strict=True,
        )
    ]
    return build_model(fields, layers, read_norm(fields), _PARTS)


def read_mlps(
    fields: Config, *, shared: Mlp | None = None, shared_gate: bool = False
) -> list[Mlp | Experts]:
    """What each layer has behind its attention: experts, or a plain MLP."""
    dense = read_mlp(fields)
    experts = Experts(
        num_experts=fields.count("num_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=replace(dense, size=fields.count("moe_intermediate_size")),
        normalised=fields.flag("norm_topk_prob", False),
        shared=shared,
        shared_gate=shared_gate,
    )
    step, plain = fields.count("decoder_sparse_step", 1), fields.ints("mlp_only_layers", ())
    return [
        experts if layer not in plain and (layer + 1) % step == 0 else dense
        for layer in range(fields.count("num_hidden_layers"))
    ]


def _windows(fields: Config) -> list[int | None]:
    if not fields.flag("use_sliding_window", False):
        return read_windows(fields, None, lambda _: False)
    if not fields.has("layer_types"):
        # Which layers have the window then differs between releases of transformers.
        raise fields.unsupported("use_sliding_window is true without layer_types", "either alone")
    return read_windows(fields, fields.count("sliding_window"), lambda _: False)

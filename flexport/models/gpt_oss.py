"""gpt-oss (`model_type` "gpt_oss").

Every second layer sees a window, each head has a sink, everything has biases. All experts' matrices
of a layer are one tensor, with features in first, and gate and up in turns. Source:
arXiv:2508.10925, and the fields of transformers' GptOssConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import (
    all_but_every,
    build_model,
    read_attention,
    read_norm,
    read_windows,
)
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import ClampedSilu, Experts, Layer, Mlp, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
    "sliding_window": 128,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
}

_PARTS = {
    **LLAMA_PARTS,
    "sinks.weight": "layers.{i}.self_attn.sinks",
    "router": "layers.{i}.mlp.router",
    "expert_gate_up.weight": "layers.{i}.mlp.experts.gate_up_proj",
    "expert_gate_up.bias": "layers.{i}.mlp.experts.gate_up_proj_bias",
    "expert_down.weight": "layers.{i}.mlp.experts.down_proj",
    "expert_down.bias": "layers.{i}.mlp.experts.down_proj_bias",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a gpt-oss config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gpt_oss", config, _DEFAULTS)
    fields.refuse_unless("hidden_act", "silu")
    gate = ClampedSilu(limit=fields.number("swiglu_limit"), steepness=fields.number("swiglu_alpha"))
    experts = Experts(
        num_experts=fields.count("num_local_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=Mlp(
            size=fields.count("intermediate_size"),
            activation=gate,
            gated=True,
            fused="pairs",
            bias=True,
            transposed=True,
        ),
        router_bias=True,
        stacked=True,
    )
    attention = replace(read_attention(fields), sinks=True)
    windows = read_windows(fields, fields.count_or_none("sliding_window"), all_but_every(2))
    layers = [Layer(attention=replace(attention, window=window), mlp=experts) for window in windows]
    return build_model(fields, layers, read_norm(fields, wide=True), _PARTS)

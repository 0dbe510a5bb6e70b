"""ERNIE 4.5 with experts (`model_type` "ernie4_5_moe").

Softmax scores are corrected when experts are picked; neighbouring features turn together. Source:
the technical report that Baidu published with ERNIE 4.5, and the fields of transformers'
Ernie4_5_MoeConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm, read_turn
from flexport.models.naming import EXPERT_PARTS
from flexport.models.spec import Experts, Layer, Mlp, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

_PARTS = {
    **EXPERT_PARTS,
    "router.correction": "layers.{i}.mlp.moe_statics.e_score_correction_bias",
}

_UNUSED = ("model.mtp_",)
"""Layers that guess more than one token."""


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an ERNIE-MoE config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("ernie4_5_moe", config, _DEFAULTS)
    fields.refuse_unless("use_bias", False)
    # A bound on the sum that shares are divided by; this small it does nothing.
    fields.refuse_unless("moe_norm_min", 1e-12)
    attention = read_attention(fields, read_turn(fields, interleaved=True))
    layers = [Layer(attention=attention, mlp=mlp) for mlp in _mlps(fields)]
    return replace(build_model(fields, layers, read_norm(fields), _PARTS), unused=_UNUSED)


def _mlps(fields: Config) -> list[Mlp | Experts]:
    dense, size = read_mlp(fields), fields.count("moe_intermediate_size")
    num_shared = fields.count("moe_num_shared_experts", least=0)
    experts = Experts(
        num_experts=fields.count("moe_num_experts"),
        top_k=fields.count("moe_k"),
        mlp=replace(dense, size=size),
        correction="row",
        shared=replace(dense, size=num_shared * size) if num_shared else None,
    )
    num_layers, step = fields.count("num_hidden_layers"), fields.count("moe_layer_interval")
    first = fields.count("moe_layer_start_index", least=0)
    last = fields.count("moe_layer_end_index", least=-1)
    with_experts = range(first, num_layers if last == -1 else last + 1)
    return [
        experts if layer in with_experts and (layer + 1) % step == 0 else dense
        for layer in range(num_layers)
    ]

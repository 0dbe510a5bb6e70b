"""Gemma 2 (`model_type` "gemma2"): Gemma with norms on both sides, soft caps and windows.

Every second layer sees the whole row. Source: arXiv:2408.00118, and the fields of transformers'
Gemma2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.gemma import read_gemma_norm
from flexport.models.like_llama import all_but_every, read_attention, read_mlp, read_windows
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import Layer, ModelSpec

__all__ = ["PARTS", "spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

PARTS: Mapping[str, str] = {
    **LLAMA_PARTS,
    "attention_out_norm": "layers.{i}.post_attention_layernorm",
    "mlp_norm": "layers.{i}.pre_feedforward_layernorm",
    "mlp_out_norm": "layers.{i}.post_feedforward_layernorm",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Gemma2 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gemma2", config, _DEFAULTS)
    fields.refuse_unless("use_bidirectional_attention", False)
    attention = replace(
        read_attention(fields),
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        soft_cap=fields.number_or_none("attn_logit_softcapping"),
    )
    mlp = read_mlp(fields, "hidden_activation")
    windows = read_windows(fields, fields.count_or_none("sliding_window"), all_but_every(2))
    layers = [
        Layer(attention=replace(attention, window=own), mlp=mlp, norms="both") for own in windows
    ]
    model = build_model(fields, layers, read_gemma_norm(fields), PARTS)
    return replace(
        model,
        embed_scale=model.hidden_size**0.5,
        logit_cap=fields.number_or_none("final_logit_softcapping"),
    )

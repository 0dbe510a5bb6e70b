"""Gemma 3's text models (`model_type` "gemma3_text"): Gemma 2 with norms of queries and keys.

Layers with a window turn by a base of their own, and a scaling is for the others alone. Every sixth
layer sees the whole row. Source: arXiv:2503.19786, and the fields of transformers'
Gemma3TextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.gemma import read_gemma_norm
from flexport.models.gemma2 import PARTS
from flexport.models.like_llama import (
    FULL,
    SLIDING,
    all_but_every,
    read_attention,
    read_mlp,
    read_turn,
    read_windows,
)
from flexport.models.spec import HeadNorm, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Gemma3 text config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gemma3_text", config, _DEFAULTS)
    fields.refuse_unless("use_bidirectional_attention", False)
    fields.refuse_unless("attn_logit_softcapping", None)
    norm, mlp = read_gemma_norm(fields), read_mlp(fields, "hidden_activation")
    full = replace(
        read_attention(fields, read_turn(fields, layer_type=FULL)),
        scale=fields.number("query_pre_attn_scalar") ** -0.5,
        head_norm=HeadNorm(norm=norm, over="head"),
    )
    near_rope = read_turn(fields, layer_type=SLIDING, theta_name="rope_local_base_freq")
    windows = read_windows(
        fields,
        fields.count_or_none("sliding_window"),
        all_but_every(fields.count("sliding_window_pattern")),
    )
    layers = [
        Layer(
            attention=full if own is None else replace(full, window=own, rope=near_rope),
            mlp=mlp,
            norms="both",
        )
        for own in windows
    ]
    model = build_model(fields, layers, norm, PARTS)
    return replace(
        model,
        embed_scale=model.hidden_size**0.5,
        logit_cap=fields.number_or_none("final_logit_softcapping"),
    )

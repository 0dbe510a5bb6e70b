"""Phi 3, 3.5 and 4 (`model_type` "phi3"): Llama with fused projections, a window and LongRoPE.

Queries, keys and values are one matrix, gate and up another. Under LongRoPE long rows turn by other
frequencies than short ones. transformers' generate goes over to them, and computes the row again,
in the step in which a row outgrows its original length; here a row has its frequencies from the
start, by the tokens that it may come to. Source: arXiv:2404.14219, arXiv:2503.01743, and the fields
of transformers' Phi3Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import LLAMA_PARTS
from flexport.models.rope import rope_fields, rope_type
from flexport.models.spec import Fused, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "pad_token_id": 32000,
}

_PARTS: Mapping[str, str] = {
    **LLAMA_PARTS,
    "qkv": "layers.{i}.self_attn.qkv_proj",
    "gate_up": "layers.{i}.mlp.gate_up_proj",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Phi3 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("phi3", config, _DEFAULTS)
    fields.refuse_unless("lm_head_bias", False)
    kind = rope_type(rope_fields(fields))
    if kind not in _ROPES:
        raise fields.unsupported(f"rope_type is {kind!r}", f"one of {', '.join(_ROPES)}")
    layer = Layer(
        attention=replace(
            read_attention(fields),
            fused=Fused(),
            window=fields.count_or_none("sliding_window"),
        ),
        mlp=replace(read_mlp(fields), fused="halves"),
    )
    layers = [layer] * fields.count("num_hidden_layers")
    return build_model(fields, layers, read_norm(fields), _PARTS)


_ROPES = ("default", "longrope", "su")
"""Phi-3's "yarn" was never published, and was not YaRN."""

"""Phi-1, Phi-1.5 and Phi-2 (`model_type` "phi").

Both halves of a layer take the same x through one norm; a share of each head turns; biases
everywhere, at the head, too. Source: arXiv:2309.05463, and the fields of transformers' PhiConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import HeadNorm, Layer, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 51200,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "hidden_act": "gelu_new",
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PARTS = {
    **LLAMA_PARTS,
    "final_norm": "final_layernorm",
    "q_norm": "layers.{i}.self_attn.q_layernorm",
    "k_norm": "layers.{i}.self_attn.k_layernorm",
    "out": "layers.{i}.self_attn.dense",
    "up": "layers.{i}.mlp.fc1",
    "down": "layers.{i}.mlp.fc2",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Phi config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("phi", config, _DEFAULTS)
    norm = Norm(kind="layer", eps=fields.number("layer_norm_eps"), bias=True)
    attention = replace(read_attention(fields), bias=True, out_bias=True)
    if fields.flag("qk_layernorm", False):
        attention = replace(attention, head_norm=HeadNorm(norm=norm, over="head"))
    mlp = replace(read_mlp(fields), gated=False, bias=True)
    layer = Layer(attention=attention, mlp=mlp, parallel="one norm")
    model = build_model(fields, [layer] * fields.count("num_hidden_layers"), norm, _PARTS)
    return replace(model, head_bias=True)

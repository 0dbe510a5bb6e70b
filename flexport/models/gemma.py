"""Gemma (`model_type` "gemma"): Llama with scaled embeddings and norms whose weights lack 1.

Embeddings are multiplied by the root of their size, rounded to the dtype. Older configs say "gelu"
and mean the tanh approximation. Source: arXiv:2403.08295, and the fields of transformers'
GemmaConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp, read_norm
from flexport.models.naming import ACTIVATIONS
from flexport.models.spec import Layer, ModelSpec, Norm

__all__ = ["read_gemma_norm", "spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Gemma config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gemma", config, _DEFAULTS)
    fields.refuse_unless("use_bidirectional_attention", False)
    fields.refuse_unless("hidden_activation", "gelu_pytorch_tanh")
    mlp = read_mlp(fields, known={**ACTIVATIONS, "gelu": "gelu_tanh"})
    layer = Layer(attention=read_attention(fields), mlp=mlp)
    model = build_model(
        fields, [layer] * fields.count("num_hidden_layers"), read_gemma_norm(fields)
    )
    return replace(model, embed_scale=model.hidden_size**0.5)


def read_gemma_norm(fields: Config) -> Norm:
    """A norm of which 1 + weight is the factor, multiplied in float32."""
    return replace(read_norm(fields, wide=True), plus_one=True)

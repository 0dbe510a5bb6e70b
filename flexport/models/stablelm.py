"""StableLM 3B, StableLM 2 and what came to be saved under their name (`model_type` "stablelm").

Llama's layers with plain layer norms, in which a share of each head turns. The 12b has a norm with
weights of its own for each head, and both halves of a layer take the same x through one norm.
Source: arXiv:2402.17834, and the fields of transformers' StableLmConfig.
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
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

_PARTS = {
    **LLAMA_PARTS,
    "q_norm": "layers.{i}.self_attn.q_layernorm.norms.{h}",
    "k_norm": "layers.{i}.self_attn.k_layernorm.norms.{h}",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a StableLM config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("stablelm", config, _DEFAULTS)
    fields.head_dim(fields.count("hidden_size"), fields.count("num_attention_heads"))
    norm = Norm(kind="layer", eps=fields.number("layer_norm_eps"), bias=True)
    biased = fields.flag("use_qkv_bias", False)
    attention = replace(read_attention(fields), bias=biased, out_bias=False)
    if fields.flag("qk_layernorm", False):
        own = HeadNorm(norm=replace(norm, bias=False), over="each", apart=True)
        attention = replace(attention, head_norm=own)
    layer = Layer(
        attention=attention,
        mlp=replace(read_mlp(fields), bias=False),
        parallel="one norm" if fields.flag("use_parallel_residual", False) else "no",
    )
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), norm, _PARTS)

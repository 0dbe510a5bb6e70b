"""GPT-NeoX-20B, Pythia, and what came to be saved under their name (`model_type` "gpt_neox").

Both halves of a layer take the same x, through a norm each, or one after the other; queries, keys
and values lie head by head in one projection; the first features of a head turn. Source:
arXiv:2204.06745, arXiv:2304.01373, and the fields of transformers' GPTNeoXConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_gpt import read_layer_norm
from flexport.models.like_llama import read_attention, read_mlp
from flexport.models.spec import Fused, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50432,
    "hidden_size": 6144,
    "intermediate_size": 24576,
    "num_hidden_layers": 44,
    "num_attention_heads": 64,
    "hidden_act": "gelu",
    "attention_bias": True,
    "partial_rotary_factor": 0.25,
    "max_position_embeddings": 2048,
    "layer_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 2,
}

_FIELDS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}

_PREFIXES = ("gpt_neox.", "")

_HEADS = ("lm_head", "embed_out")
"""As transformers 5 calls it, and as checkpoints have it."""

_PARTS = {
    "tokens": "embed_in",
    "final_norm": "final_layer_norm",
    "attention_norm": "layers.{i}.input_layernorm",
    "qkv": "layers.{i}.attention.query_key_value",
    "out": "layers.{i}.attention.dense",
    "mlp_norm": "layers.{i}.post_attention_layernorm",
    "up": "layers.{i}.mlp.dense_h_to_4h",
    "down": "layers.{i}.mlp.dense_4h_to_h",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-NeoX config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gpt_neox", config, _DEFAULTS, also=_FIELDS)
    num_heads = fields.count("num_attention_heads")
    fields.head_dim(fields.count("hidden_size"), num_heads)
    fields.refuse_unless("num_key_value_heads", num_heads)
    layer = Layer(
        attention=replace(read_attention(fields), fused=Fused(num_parts=num_heads)),
        mlp=replace(read_mlp(fields), gated=False, bias=True),
        parallel="two norms" if fields.flag("use_parallel_residual", True) else "no",
    )
    layers = [layer] * fields.count("num_hidden_layers")
    norm = read_layer_norm(fields, "layer_norm_eps")
    return build_model(fields, layers, norm, _PARTS, _PREFIXES, _HEADS)

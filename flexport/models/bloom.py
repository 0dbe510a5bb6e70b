"""BLOOM, BLOOMZ and what came to be saved under their name (`model_type` "bloom").

ALiBi in place of positions, a norm after the embedding; queries, keys and values lie head by head
in one projection; GELU by its tanh. Source: arXiv:2211.05100, and the fields of transformers'
BloomConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.alibi import alibi_slopes
from flexport.models.config import Config
from flexport.models.like_llama import build_model
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 250880,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PREFIXES = ("transformer.", "")

_FIELDS = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    # ALiBi has no end; this is how long the texts of the training were.
    "seq_length": "max_position_embeddings",
}

_PARTS = {
    "tokens": "word_embeddings",
    "embed_norm": "word_embeddings_layernorm",
    "final_norm": "ln_f",
    "attention_norm": "h.{i}.input_layernorm",
    "qkv": "h.{i}.self_attention.query_key_value",
    "out": "h.{i}.self_attention.dense",
    "mlp_norm": "h.{i}.post_attention_layernorm",
    "up": "h.{i}.mlp.dense_h_to_4h",
    "down": "h.{i}.mlp.dense_4h_to_h",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a BLOOM config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("bloom", config, _DEFAULTS, also=_FIELDS)
    # The norm's output would be what the halves are added to.
    fields.refuse_unless("apply_residual_connection_post_layernorm", False)

    hidden_size = fields.count("hidden_size")
    fields.refuse_unless("n_inner", 4 * hidden_size)
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            fused=Fused(num_parts=num_heads),
            bias=True,
            out_bias=True,
            slopes=alibi_slopes(num_heads),
        ),
        mlp=Mlp(size=4 * hidden_size, activation="gelu_tanh", bias=True),
    )
    layers = [layer] * fields.count("num_hidden_layers")
    norm = Norm(kind="layer", eps=fields.number("layer_norm_epsilon"), bias=True)
    return replace(build_model(fields, layers, norm, _PARTS, _PREFIXES), embed_norm=True)

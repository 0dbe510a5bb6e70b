"""Persimmon 8B for flexport (`model_type` "persimmon").

Layer norms and biases everywhere; queries, keys and values lie head by head in one projection; each
head's queries and keys have a norm, and half of their features turn; squared ReLU. Source: the
fields of transformers' PersimmonConfig, whose defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models import (
    ACTIVATIONS,
    Attention,
    Config,
    Fused,
    HeadNorm,
    Layer,
    Mlp,
    ModelSpec,
    Norm,
    checkpoint_names,
    read_rope,
)

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "max_position_embeddings": 16384,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_PARTS = {
    "tokens": "embed_tokens",
    "final_norm": "final_layernorm",
    "attention_norm": "layers.{i}.input_layernorm",
    "qkv": "layers.{i}.self_attn.query_key_value",
    "q_norm": "layers.{i}.self_attn.q_layernorm",
    "k_norm": "layers.{i}.self_attn.k_layernorm",
    "out": "layers.{i}.self_attn.dense",
    "mlp_norm": "layers.{i}.post_attention_layernorm",
    "up": "layers.{i}.mlp.dense_h_to_4h",
    "down": "layers.{i}.mlp.dense_4h_to_h",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Persimmon config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("persimmon", config, _DEFAULTS)
    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    fields.refuse_unless("num_key_value_heads", num_heads)
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.count("max_position_embeddings")
    rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions)
    norm = Norm(kind="layer", eps=fields.number("layer_norm_eps"), bias=True)
    norms_heads = fields.flag("qk_layernorm", True)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            fused=Fused(num_parts=num_heads),
            bias=True,
            out_bias=True,
            rope=rope,
            head_norm=HeadNorm(norm=norm, over="head") if norms_heads else None,
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size"),
            activation=fields.choice("hidden_act", "relu2", ACTIVATIONS),
            bias=True,
        ),
    )
    tied_head = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        family="persimmon",
        vocab_size=fields.count("vocab_size"),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers"),
        norm=norm,
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, tied_head=tied_head),
    )

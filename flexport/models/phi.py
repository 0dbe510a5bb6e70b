"""Phi-1, Phi-1.5 and Phi-2 (`model_type` "phi").

Both halves of a layer take the same x through one norm; a share of each head turns; biases
everywhere, at the head, too. Source: arXiv:2309.05463, and the config fields of transformers'
PhiConfig, whose defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, LLAMA_PARTS, checkpoint_names
from flexport.models.rope import read_rope
from flexport.models.spec import Attention, HeadNorm, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

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
    fields = Config("phi", config)
    hidden_size = fields.count("hidden_size", 2048)
    num_heads = fields.count("num_attention_heads", 32)
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.count("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions, share=0.5)
    norm = Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5), bias=True)
    norms_heads = fields.flag("qk_layernorm", False)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=fields.kv_heads("num_key_value_heads", num_heads, num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=True,
            out_bias=True,
            rope=rope,
            head_norm=HeadNorm(norm=norm, over="head") if norms_heads else None,
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size", 8192),
            activation=fields.choice("hidden_act", "gelu_new", ACTIVATIONS),
            bias=True,
        ),
        parallel="one norm",
    )
    tied_head = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        family="phi",
        vocab_size=fields.count("vocab_size", 51200),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers", 24),
        norm=norm,
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        head_bias=True,
        bos_token_id=fields.token_id("bos_token_id", 1),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, tied_head=tied_head),
    )

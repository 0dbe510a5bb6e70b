"""Llama 1 to 3, and all that came to be saved under its name (`model_type` "llama").

Root-mean-square norms before each half, rotary positions, grouped heads, a gated MLP with SiLU.
Source: arXiv:2302.13971, arXiv:2407.21783, and the config fields of transformers' LlamaConfig,
whose defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, LLAMA_PARTS, checkpoint_names
from flexport.models.rope import read_rope
from flexport.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Llama config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("llama", config)
    hidden_size = fields.count("hidden_size", 4096)
    num_heads = fields.count("num_attention_heads", 32)
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    max_positions = fields.count("max_position_embeddings", 2048)
    rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions)
    attention_bias = fields.flag("attention_bias", False)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=fields.count("num_key_value_heads", num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=attention_bias,
            out_bias=attention_bias,
            rope=rope,
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size", 11008),
            activation=fields.choice("hidden_act", "silu", ACTIVATIONS),
            gated=True,
            bias=fields.flag("mlp_bias", False),
        ),
    )
    tied_head = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        family="llama",
        vocab_size=fields.count("vocab_size", 32000),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers", 32),
        norm=Norm(kind="rms", eps=fields.number("rms_norm_eps", 1e-6)),
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 1),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(LLAMA_PARTS, tied_head=tied_head),
    )

"""StarCoder 2 (`model_type` "starcoder2").

Plain layer norms, biases everywhere but at the head, rotary positions, grouped heads that see a
window, GELU by its tanh. Source: arXiv:2402.19173, and the config fields of transformers'
Starcoder2Config, whose defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, LLAMA_PARTS, checkpoint_names
from flexport.models.rope import read_rope
from flexport.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_PARTS = {**LLAMA_PARTS, "up": "layers.{i}.mlp.c_fc", "down": "layers.{i}.mlp.c_proj"}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a StarCoder 2 config; raises UnsupportedModel for what flexport can't run."""
    fields = Config("starcoder2", config)
    # Published configs have these; transformers knows no other values.
    fields.refuse_unless("mlp_type", "default")
    fields.refuse_unless("norm_type", "layer_norm")
    fields.refuse_unless("scale_attn_weights", True)

    hidden_size = fields.count("hidden_size", 3072)
    num_heads = fields.count("num_attention_heads", 24)
    head_dim = fields.count("head_dim", hidden_size // num_heads)
    max_positions = fields.count("max_position_embeddings", 4096)
    rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions)
    bias = fields.flag("use_bias", True)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=fields.kv_heads("num_key_value_heads", 2, num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=bias,
            out_bias=bias,
            rope=rope,
            window=fields.count_or_none("sliding_window"),
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size", 12288),
            activation=fields.choice("hidden_act", "gelu_pytorch_tanh", ACTIVATIONS),
            bias=bias,
        ),
    )
    tied_head = fields.flag("tie_word_embeddings", True)
    return ModelSpec(
        family="starcoder2",
        vocab_size=fields.count("vocab_size", 49152),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers", 30),
        norm=Norm(kind="layer", eps=fields.number("norm_epsilon", 1e-5), bias=True),
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 50256),
        eos_token_ids=fields.token_ids("eos_token_id", 50256),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, tied_head=tied_head),
    )

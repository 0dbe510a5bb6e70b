"""GPT-2, and all that came to be saved under its name (`model_type` "gpt2").

Learned positions, plain layer norms before each half, GELU by its tanh. Its matrices lie the
other way round, (features in, features out). Attention may go unscaled, or have its
scale divided by the layer's number. Source: the config fields of transformers' GPT2Config, whose
defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, GPT_FIELDS, checkpoint_names
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_PREFIXES = ("transformer.", "")

_PARTS = {
    "tokens": "wte",
    "positions": "wpe",
    "final_norm": "ln_f",
    "attention_norm": "h.{i}.ln_1",
    "qkv": "h.{i}.attn.c_attn",
    "out": "h.{i}.attn.c_proj",
    "mlp_norm": "h.{i}.ln_2",
    "up": "h.{i}.mlp.c_fc",
    "down": "h.{i}.mlp.c_proj",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-2 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gpt2", config, also=GPT_FIELDS)
    fields.refuse_unless("add_cross_attention", False)

    hidden_size = fields.count("n_embd", 768)
    num_heads = fields.count("n_head", 12)
    head_dim = fields.head_dim(hidden_size, num_heads)
    scale = head_dim**-0.5 if fields.flag("scale_attn_weights", True) else 1.0
    falls = fields.flag("scale_attn_by_inverse_layer_idx", False)
    mlp = Mlp(
        size=fields.count("n_inner", 4 * hidden_size),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        bias=True,
        transposed=True,
    )

    def layer(number: int) -> Layer:
        attention = Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=scale / number if falls else scale,
            fused=Fused(),
            bias=True,
            out_bias=True,
        )
        return Layer(attention=attention, mlp=mlp, transposed=True)

    max_positions = fields.count("n_positions", 1024)
    tied_head = fields.flag("tie_word_embeddings", True)
    return ModelSpec(
        family="gpt2",
        vocab_size=fields.count("vocab_size", 50257),
        hidden_size=hidden_size,
        layers=tuple(layer(number) for number in range(1, fields.count("n_layer", 12) + 1)),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_epsilon", 1e-5), bias=True),
        max_positions=max_positions,
        learned_positions=max_positions,
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 50256),
        eos_token_ids=fields.token_ids("eos_token_id", 50256),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, _PREFIXES, tied_head=tied_head),
    )

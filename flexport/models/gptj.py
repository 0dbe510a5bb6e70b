"""GPT-J (`model_type` "gptj"), and what CodeGen has in common with it.

Both halves of a layer take the same x through one norm; the first features of a head turn, by
neighbouring pairs; the MLP has biases and attention has none; the head has a bias. Source: the
fields of transformers' GPTJConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model
from flexport.models.naming import ACTIVATIONS, GPT_FIELDS
from flexport.models.rope import plain_rope
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec", "spec_like"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50400,
    "hidden_size": 4096,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "rotary_dim": 64,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

_PREFIXES = ("transformer.", "")

_PARTS = {
    "tokens": "wte",
    "final_norm": "ln_f",
    "attention_norm": "h.{i}.ln_1",
    "out": "h.{i}.attn.out_proj",
    "up": "h.{i}.mlp.fc_in",
    "down": "h.{i}.mlp.fc_out",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-J config; raises UnsupportedModel for what flexport does not know."""
    parts = {part: f"h.{{i}}.attn.{part}_proj" for part in ("q", "k", "v")}
    return spec_like("gptj", config, parts)


def spec_like(
    family: str,
    config: Mapping[str, Any],
    projections: Mapping[str, str],
    fused: Fused | None = None,
) -> ModelSpec:
    """The spec of a model like GPT-J, whose projections have these names, or are fused so."""
    fields = Config(family, config, _DEFAULTS, also=GPT_FIELDS)
    # Published configs have these; the code that they are published for knows no other values.
    fields.refuse_unless("rotary", True)
    fields.refuse_unless("scale_attn_weights", True)
    fields.refuse_unless("rope_scaling", None)
    fields.refuse_unless("rope_parameters", None)

    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    if fused is not None and num_heads % fused.num_parts:
        raise fields.unsupported(
            f"n_head is {num_heads}", f"multiples of the {fused.num_parts} parts of a projection"
        )
    rotary_dim = fields.count("rotary_dim")
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.unsupported(
            f"rotary_dim is {rotary_dim}", f"an even number of a head's {head_dim} features"
        )
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            fused=fused,
            rope=plain_rope(rotary_dim, interleaved=True),
        ),
        mlp=Mlp(
            size=fields.count("n_inner", 4 * hidden_size),
            activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
            bias=True,
        ),
        parallel="one norm",
    )
    layers = [layer] * fields.count("num_hidden_layers")
    norm = Norm(kind="layer", eps=fields.number("layer_norm_epsilon"), bias=True)
    model = build_model(fields, layers, norm, {**_PARTS, **projections}, _PREFIXES)
    return replace(model, head_bias=True)

"""GPT-2, and all that came to be saved under its name (`model_type` "gpt2").

Learned positions, plain layer norms before each half, GELU by its tanh. Its matrices lie the other
way round, (features in, features out). Attention may go unscaled, or have its scale divided by the
layer's number. Source: the fields of transformers' GPT2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_gpt import FIELDS, PREFIXES, read_attention, read_layer_norm, read_mlp
from flexport.models.spec import Fused, Layer, ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50257,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 1024,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

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
    fields = Config("gpt2", config, _DEFAULTS, also=FIELDS)
    attention = replace(read_attention(fields, bias=True), fused=Fused())
    if not fields.flag("scale_attn_weights", True):
        attention = replace(attention, scale=1.0)
    falls = fields.flag("scale_attn_by_inverse_layer_idx", False)
    mlp = replace(read_mlp(fields), transposed=True)

    def layer(number: int) -> Layer:
        scale = attention.scale / number if falls else attention.scale
        return Layer(attention=replace(attention, scale=scale), mlp=mlp, transposed=True)

    layers = [layer(number) for number in range(1, fields.count("num_hidden_layers") + 1)]
    model = build_model(fields, layers, read_layer_norm(fields), _PARTS, PREFIXES)
    return replace(model, learned_positions=model.max_positions)

"""StarCoder 2 (`model_type` "starcoder2").

Plain layer norms, biases everywhere but at the head, grouped heads that see a window, a plain MLP.
Source: arXiv:2402.19173, and the fields of transformers' Starcoder2Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_attention, read_mlp
from flexport.models.naming import LLAMA_PARTS
from flexport.models.spec import Layer, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 3072,
    "intermediate_size": 12288,
    "num_hidden_layers": 30,
    "num_attention_heads": 24,
    "num_key_value_heads": 2,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 4096,
    "norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 50256,
    "eos_token_id": 50256,
}

_PARTS = {**LLAMA_PARTS, "up": "layers.{i}.mlp.c_fc", "down": "layers.{i}.mlp.c_proj"}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a StarCoder 2 config; raises UnsupportedModel for what flexport can't run."""
    fields = Config("starcoder2", config, _DEFAULTS)
    # Published configs have these; transformers knows no other values.
    fields.refuse_unless("mlp_type", "default")
    fields.refuse_unless("norm_type", "layer_norm")
    fields.refuse_unless("scale_attn_weights", True)

    biased = fields.flag("use_bias", True)
    window = fields.count_or_none("sliding_window")
    layer = Layer(
        attention=replace(read_attention(fields), bias=biased, out_bias=biased, window=window),
        mlp=replace(read_mlp(fields), gated=False, bias=biased),
    )
    norm = Norm(kind="layer", eps=fields.number("norm_epsilon"), bias=True)
    return build_model(fields, [layer] * fields.count("num_hidden_layers"), norm, _PARTS)

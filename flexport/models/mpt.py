"""MPT (`model_type` "mpt").

ALiBi in place of positions, layer norms without biases, no biases at all; queries, keys and values
are stacked in one projection. Source: the fields of transformers' MptConfig.

The code that trained these models knows more than transformers runs: such configs are refused.
Only alibi_bias_max, which is 16 in the "storywriter" and which transformers passes over, is taken at
its word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from flexport.models.alibi import alibi_slopes
from flexport.models.config import Config
from flexport.models.like_llama import build_model
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}

_PREFIXES = ("transformer.", "")

_FIELDS = {
    "d_model": "hidden_size",
    "max_seq_len": "max_position_embeddings",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
}

_PARTS = {
    "tokens": "wte",
    "final_norm": "norm_f",
    "attention_norm": "blocks.{i}.norm_1",
    "qkv": "blocks.{i}.attn.Wqkv",
    "out": "blocks.{i}.attn.out_proj",
    "mlp_norm": "blocks.{i}.norm_2",
    "up": "blocks.{i}.ffn.up_proj",
    "down": "blocks.{i}.ffn.down_proj",
}

_NORMS: Mapping[str, Literal["layer"]] = {"low_precision_layernorm": "layer", "layernorm": "layer"}
"""The two differ in the dtype that they compute in."""

_ONLY: Mapping[str, object] = {"expansion_ratio": 4, "no_bias": True, "logit_scale": None}

_ONLY_IN_ATTENTION: Mapping[str, object] = {
    # With ALiBi, learned_pos_emb asks for nothing.
    "alibi": True,
    "attn_type": "multihead_attention",
    "attn_uses_sequence_id": False,
    "prefix_lm": False,
    "qk_ln": False,
    "qk_gn": False,
    "rope": False,
    "sliding_window_size": -1,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an MPT config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("mpt", config, _DEFAULTS, also=_FIELDS)
    for name, required in _ONLY.items():
        fields.refuse_unless(name, required)
    fields.within("ffn_config", fields.mapping("ffn_config")).refuse_unless("ffn_type", "mptmlp")
    own = fields.within("attn_config", fields.mapping("attn_config"))
    for name, required in _ONLY_IN_ATTENTION.items():
        own.refuse_unless(name, required)

    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=own.number("softmax_scale", head_dim**-0.5),
            fused=Fused(),
            clip=own.number_or_none("clip_qkv") or None,  # 0 clips nothing
            slopes=alibi_slopes(num_heads, own.number("alibi_bias_max", 8.0)),
        ),
        mlp=Mlp(size=4 * hidden_size, activation="gelu"),
    )
    norm_kind = fields.choice("norm_type", "low_precision_layernorm", _NORMS)
    norm = Norm(kind=norm_kind, eps=fields.number("layer_norm_epsilon"))
    layers = [layer] * fields.count("num_hidden_layers")
    return build_model(fields, layers, norm, _PARTS, _PREFIXES)

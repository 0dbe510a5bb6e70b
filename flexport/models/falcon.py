"""Falcon 1 and 2, and the RefinedWeb models (`model_type` "falcon").

Three kinds of decoder: that of the 7b has one key/value head and one norm for both halves; the
"new" one of the 40b, 11b and 180b has a key/value head a group, each group's heads lying together,
and one norm or two; that of the RefinedWeb models has halves one after the other, as many
key/value heads as heads, and ALiBi in place of rotary positions. Source: arXiv:2311.16867,
arXiv:2306.01116, and the fields of transformers' FalconConfig.

ALiBi's slopes are divided by the root of a head's features, as scores are. transformers rounds
what a column adds to its score to bfloat16, 0.4 % of it at most; here it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from flexport.models.alibi import alibi_slopes
from flexport.models.config import Config
from flexport.models.like_llama import build_model, read_turn
from flexport.models.naming import ACTIVATIONS
from flexport.models.rope import Rope
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "max_position_embeddings": 2048,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 11,
    "eos_token_id": 11,
}

_PREFIXES = ("transformer.", "")

_FIELDS = {
    "n_embed": "hidden_size",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_layer": "num_hidden_layers",
}
"""As the first published configs had them."""

_PARTS = {
    "tokens": "word_embeddings",
    "final_norm": "ln_f",
    "qkv": "h.{i}.self_attention.query_key_value",
    "out": "h.{i}.self_attention.dense",
    "up": "h.{i}.mlp.dense_h_to_4h",
    "down": "h.{i}.mlp.dense_4h_to_h",
}

Parallel = Literal["no", "one norm", "two norms"]

_NORMS: Mapping[Parallel, Mapping[str, str]] = {
    "no": {
        "attention_norm": "h.{i}.input_layernorm",
        "mlp_norm": "h.{i}.post_attention_layernorm",
    },
    "one norm": {"attention_norm": "h.{i}.input_layernorm"},
    "two norms": {"attention_norm": "h.{i}.ln_attn", "mlp_norm": "h.{i}.ln_mlp"},
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Falcon config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("falcon", config, _DEFAULTS, also=_FIELDS)
    fields.refuse_unless("apply_residual_connection_post_layernorm", False)
    fields.refuse_unless("partial_rotary_factor", 1.0)

    hidden_size = fields.count("hidden_size")
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(hidden_size, num_heads)
    bias = fields.flag("bias", False)
    parallel = _parallel(fields)
    num_kv_heads, fused = _heads(fields, num_heads)
    rope: Rope | None = None
    slopes: tuple[float, ...] | None = None
    if fields.flag("alibi", False):
        slopes = tuple(slope * head_dim**-0.5 for slope in alibi_slopes(num_heads))
    else:
        rope = read_turn(fields)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            fused=fused,
            bias=bias,
            out_bias=bias,
            rope=rope,
            slopes=slopes,
        ),
        mlp=Mlp(
            size=fields.count("ffn_hidden_size", 4 * hidden_size),
            activation=fields.choice("activation", "gelu", ACTIVATIONS),
            bias=bias,
        ),
        parallel=parallel,
    )
    layers = [layer] * fields.count("num_hidden_layers")
    norm = Norm(kind="layer", eps=fields.number("layer_norm_epsilon"), bias=True)
    return build_model(fields, layers, norm, {**_PARTS, **_NORMS[parallel]}, _PREFIXES)


def _parallel(fields: Config) -> Parallel:
    """Whether the halves take the same x, and through how many norms."""
    if fields.flag("new_decoder_architecture", False):
        fields.refuse_unless("parallel_attn", True)
        num_norms = fields.count("num_ln_in_parallel_attn", 2)
        if num_norms > 2:
            raise fields.unsupported(f"num_ln_in_parallel_attn is {num_norms}", "1 or 2")
        return "two norms" if num_norms == 2 else "one norm"
    fields.refuse_unless("num_ln_in_parallel_attn", 1)
    return "one norm" if fields.flag("parallel_attn", True) else "no"


def _heads(fields: Config, num_heads: int) -> tuple[int, Fused]:
    """How many key/value heads there are, and how the projection has them."""
    if fields.flag("new_decoder_architecture", False):
        num_kv_heads = fields.kv_heads("num_kv_heads", num_heads, num_heads)
        return num_kv_heads, Fused(num_parts=num_kv_heads)
    if fields.flag("multi_query", True):
        return 1, Fused()
    fields.refuse_unless("num_kv_heads", num_heads)
    return num_heads, Fused(num_parts=num_heads)

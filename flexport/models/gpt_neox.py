"""GPT-NeoX-20B, Pythia, and what came to be saved under their name (`model_type` "gpt_neox").

Both halves of a layer take the same x, through a norm each, or one after the other; queries, keys
and values lie head by head in one projection; the first features of a head turn. Source:
arXiv:2204.06745, arXiv:2304.01373, and the config fields of transformers' GPTNeoXConfig, whose
defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, checkpoint_names
from flexport.models.rope import read_rope
from flexport.models.spec import Attention, Fused, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_PREFIXES = ("gpt_neox.", "")

_HEADS = ("lm_head", "embed_out")
"""As transformers 5 calls it, and as checkpoints have it."""

_PARTS = {
    "tokens": "embed_in",
    "final_norm": "final_layer_norm",
    "attention_norm": "layers.{i}.input_layernorm",
    "qkv": "layers.{i}.attention.query_key_value",
    "out": "layers.{i}.attention.dense",
    "mlp_norm": "layers.{i}.post_attention_layernorm",
    "up": "layers.{i}.mlp.dense_h_to_4h",
    "down": "layers.{i}.mlp.dense_4h_to_h",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GPT-NeoX config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("gpt_neox", config)
    hidden_size = fields.count("hidden_size", 6144)
    num_heads = fields.count("num_attention_heads", 64)
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.count("max_position_embeddings", 2048)
    rope = read_rope(
        fields,
        head_dim=head_dim,
        max_positions=max_positions,
        theta_name="rotary_emb_base",
        share=fields.number("rotary_pct", 0.25),
    )
    attention_bias = fields.flag("attention_bias", True)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            fused=Fused(num_parts=num_heads),
            bias=attention_bias,
            out_bias=attention_bias,
            rope=rope,
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size", 24576),
            activation=fields.choice("hidden_act", "gelu", ACTIVATIONS),
            bias=True,
        ),
        parallel="two norms" if fields.flag("use_parallel_residual", True) else "no",
    )
    tied_head = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        family="gpt_neox",
        vocab_size=fields.count("vocab_size", 50432),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers", 44),
        norm=Norm(kind="layer", eps=fields.number("layer_norm_eps", 1e-5), bias=True),
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 0),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, _PREFIXES, tied_head=tied_head, heads=_HEADS),
    )

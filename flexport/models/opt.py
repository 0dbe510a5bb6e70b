"""OPT, OPT-IML and Galactica (`model_type` "opt").

Learned positions whose table begins with two rows that are never used; plain layer norms, before
each half of a layer except in the 350m, which has them after, has no final norm and keeps its
token table at half width between two projections; ReLU. Galactica has GELU and may do without
biases. Source: arXiv:2205.01068, arXiv:2211.09085, and the config fields of transformers'
OPTConfig, whose defaults are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, checkpoint_names
from flexport.models.spec import Attention, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_POSITION_OFFSET = 2
"""fairseq numbered positions from padding_idx + 1 = 2 on, and the trained table kept that."""

_PREFIXES = ("model.decoder.", "decoder.", "")
"""Saved as a causal language model, as the bare model (facebook/opt-*), as the bare decoder."""

_PARTS = {
    "tokens": "embed_tokens",
    "positions": "embed_positions",
    "project_in": "project_in",
    "project_out": "project_out",
    "final_norm": "final_layer_norm",
    "attention_norm": "layers.{i}.self_attn_layer_norm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "out": "layers.{i}.self_attn.out_proj",
    "mlp_norm": "layers.{i}.final_layer_norm",
    "up": "layers.{i}.fc1",
    "down": "layers.{i}.fc2",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an OPT config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("opt", config)
    # Older OPT forks could scale embeddings or use sinusoids; the decoder here does neither.
    fields.refuse_unless("scale_embeddings", False)
    fields.refuse_unless("learned_embeddings", True)

    hidden_size = fields.count("hidden_size", 768)
    num_heads = fields.count("num_attention_heads", 12)
    head_dim = fields.head_dim(hidden_size, num_heads)
    norm_before = fields.flag("do_layer_norm_before", True)
    affine = fields.flag("layer_norm_elementwise_affine", True)
    bias = fields.flag("enable_bias", True)
    tied_head = fields.flag("tie_word_embeddings", True)
    max_positions = fields.count("max_position_embeddings", 2048)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=bias,
            out_bias=bias,
        ),
        mlp=Mlp(
            size=fields.count("ffn_dim", 3072),
            activation=fields.choice("activation_function", "relu", ACTIVATIONS),
            bias=bias,
        ),
        norms="input" if norm_before else "sum",
    )
    return ModelSpec(
        family="opt",
        vocab_size=fields.count("vocab_size", 50272),
        hidden_size=hidden_size,
        embed_size=fields.count("word_embed_proj_dim", hidden_size),
        layers=(layer,) * fields.count("num_hidden_layers", 12),
        norm=Norm(kind="layer", eps=1e-5, weight=affine, bias=affine),
        max_positions=max_positions,
        learned_positions=max_positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        final_norm=norm_before and not fields.flag("_remove_final_layer_norm", False),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 2),
        eos_token_ids=fields.token_ids("eos_token_id", 2),
        pad_token_id=fields.token_id("pad_token_id", 1),
        names=_names(norm_before, tied_head),
    )


def _names(norm_before: bool, tied_head: bool) -> dict[str, tuple[str, ...]]:
    parts = dict(_PARTS)
    if not norm_before:
        parts["attention_out_norm"] = parts.pop("attention_norm")
        parts["mlp_out_norm"] = parts.pop("mlp_norm")
    return checkpoint_names(parts, _PREFIXES, tied_head=tied_head)

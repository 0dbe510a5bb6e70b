"""OPT, OPT-IML and Galactica (`model_type` "opt").

Learned positions whose table begins with two rows that are never used; plain layer norms, before
each half of a layer except in the 350m, which has them after, has no final norm and keeps its
token table at half width between two projections; ReLU. Galactica has GELU and may do without
biases. Source: arXiv:2205.01068, arXiv:2211.09085, and the fields of transformers' OPTConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_gpt import read_attention
from flexport.models.naming import ACTIVATIONS
from flexport.models.spec import Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "ffn_dim": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}

_EPS = 1e-5
"""Of all norms; no config has it."""

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

_PARTS_BEHIND = {
    **_PARTS,
    "attention_out_norm": _PARTS["attention_norm"],
    "mlp_out_norm": _PARTS["mlp_norm"],
}
"""Where the norms stand after the sums, under the same names."""


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of an OPT config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("opt", config, _DEFAULTS)
    # Older OPT forks could scale embeddings or use sinusoids; the decoder here does neither.
    fields.refuse_unless("scale_embeddings", False)
    fields.refuse_unless("learned_embeddings", True)

    norm_before = fields.flag("do_layer_norm_before", True)
    affine = fields.flag("layer_norm_elementwise_affine", True)
    bias = fields.flag("enable_bias", True)
    layer = Layer(
        attention=read_attention(fields, bias=bias),
        mlp=Mlp(
            size=fields.count("ffn_dim"),
            activation=fields.choice("activation_function", "relu", ACTIVATIONS),
            bias=bias,
        ),
        norms="input" if norm_before else "sum",
    )
    model = build_model(
        fields,
        [layer] * fields.count("num_hidden_layers"),
        Norm(kind="layer", eps=_EPS, weight=affine, bias=affine),
        _PARTS if norm_before else _PARTS_BEHIND,
        _PREFIXES,
    )
    return replace(
        model,
        embed_size=fields.count("word_embed_proj_dim", model.hidden_size),
        learned_positions=model.max_positions + _POSITION_OFFSET,
        position_offset=_POSITION_OFFSET,
        final_norm=norm_before and not fields.flag("_remove_final_layer_norm", False),
    )

"""Command R (`model_type` "cohere"): both halves of a layer from one norm, and scaled logits.

Norms subtract the mean and have no bias; those of queries and keys, where there are any, have
weights for each head. Neighbouring features turn together. Source: the model cards of CohereLabs'
c4ai-command-r-v01 and -plus, and the fields of transformers' CohereConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_attention, read_mlp, read_turn
from flexport.models.spec import HeadNorm, Layer, ModelSpec, Norm

__all__ = ["DEFAULTS", "read_cohere_norm", "refuse_other_designs", "spec"]

DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 256000,
    "hidden_size": 8192,
    "intermediate_size": 22528,
    "num_hidden_layers": 40,
    "num_attention_heads": 64,
    "max_position_embeddings": 8192,
    "layer_norm_eps": 1e-5,
    "logit_scale": 0.0625,
    "rope_theta": 5e5,
    "tie_word_embeddings": True,
    "bos_token_id": 5,
    "eos_token_id": 255001,
    "pad_token_id": 0,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Cohere config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("cohere", config, DEFAULTS)
    refuse_other_designs(fields)
    norm = read_cohere_norm(fields)
    attention = read_attention(fields, read_turn(fields, interleaved=True))
    if fields.flag("use_qk_norm", False):
        attention = replace(attention, head_norm=HeadNorm(norm=norm, over="each"))
    layer = Layer(attention=attention, mlp=read_mlp(fields), parallel="one norm")
    model = build_model(fields, [layer] * fields.count("num_hidden_layers"), norm)
    return replace(model, logit_scale=fields.number("logit_scale"))


def read_cohere_norm(fields: Config) -> Norm:
    """A layer norm without a bias."""
    return Norm(kind="layer", eps=fields.number("layer_norm_eps"))


def refuse_other_designs(fields: Config) -> None:
    """What published configs say beside what transformers reads; here it always holds."""
    fields.refuse_unless("use_parallel_block", True)
    fields.refuse_unless("use_gated_activation", True)
    fields.refuse_unless("position_embedding_type", "rope_gptj")
    fields.refuse_unless("rotary_pct", 1.0)

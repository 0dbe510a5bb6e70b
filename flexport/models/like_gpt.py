"""What the families before Llama have in common, and how their configs say it.

Plain layer norms, and heads that share the hidden features out among them, each with keys and
values of its own. The names of config fields are those of GPT-2's code.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS
from flexport.models.spec import Attention, Mlp, Norm

__all__ = ["FIELDS", "PREFIXES", "read_attention", "read_layer_norm", "read_mlp"]

FIELDS: Mapping[str, str] = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""GPT-2's names of config fields, with those that others have."""

PREFIXES = ("transformer.", "")
"""Saved as a causal language model, or as the bare model."""


def read_attention(fields: Config, *, bias: bool = False) -> Attention:
    """Heads that do not turn; all projections have biases, or none."""
    num_heads = fields.count("num_attention_heads")
    head_dim = fields.head_dim(fields.count("hidden_size"), num_heads)
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        bias=bias,
        out_bias=bias,
    )


def read_mlp(fields: Config) -> Mlp:
    """An MLP with biases and no gate, four times as wide as the hidden states if nothing is said."""
    return Mlp(
        size=fields.count("n_inner", 4 * fields.count("hidden_size")),
        activation=fields.choice("activation_function", "gelu_new", ACTIVATIONS),
        bias=True,
    )


def read_layer_norm(fields: Config, eps: str = "layer_norm_epsilon") -> Norm:
    """A layer norm with weights and biases; `eps` is the name of the field that has its epsilon."""
    return Norm(kind="layer", eps=fields.number(eps), bias=True)

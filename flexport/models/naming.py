"""What families share of names: activations as configs call them, tensors as checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexport.models.spec import Activation

__all__ = ["ACTIVATIONS", "GPT_FIELDS", "LLAMA_PARTS", "checkpoint_names"]

ACTIVATIONS: Mapping[str, Activation] = {
    "relu": "relu",
    "relu2": "relu_squared",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}

GPT_FIELDS: Mapping[str, str] = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
"""Config fields of GPT-2 and of what was made from its code, by the names that others have."""

LLAMA_PARTS: Mapping[str, str] = {
    "tokens": "embed_tokens",
    "final_norm": "norm",
    "attention_norm": "layers.{i}.input_layernorm",
    "q": "layers.{i}.self_attn.q_proj",
    "k": "layers.{i}.self_attn.k_proj",
    "v": "layers.{i}.self_attn.v_proj",
    "q_norm": "layers.{i}.self_attn.q_norm",
    "k_norm": "layers.{i}.self_attn.k_norm",
    "out": "layers.{i}.self_attn.o_proj",
    "mlp_norm": "layers.{i}.post_attention_layernorm",
    "gate": "layers.{i}.mlp.gate_proj",
    "up": "layers.{i}.mlp.up_proj",
    "down": "layers.{i}.mlp.down_proj",
}
"""Llama's names, from which most families differ by a few."""

PREFIXES = ("model.", "")
"""Saved as a causal language model, or as the bare model."""


def checkpoint_names(
    parts: Mapping[str, str],
    prefixes: Sequence[str] = PREFIXES,
    *,
    tied_head: bool,
    heads: Sequence[str] = ("lm_head",),
) -> dict[str, tuple[str, ...]]:
    """The names of a `ModelSpec`: each part behind each prefix, and what the head may be called.

    Of two names for a tied tensor a checkpoint may have kept either.
    """
    names = {part: tuple(prefix + name for prefix in prefixes) for part, name in parts.items()}
    if tied_head:
        names["tokens"] += tuple(heads)
        names["head"] = names["tokens"]
        names["head.bias"] = tuple(f"{head}.bias" for head in heads)
    else:
        names["head"] = tuple(heads)
    return names

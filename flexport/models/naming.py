"""What families share of names: activations as configs call them, tensors as checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexport.models.spec import Activation

__all__ = [
    "ACTIVATIONS",
    "EXPERT_PARTS",
    "GPT_FIELDS",
    "LLAMA_PARTS",
    "PREFIXES",
    "checkpoint_names",
]

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
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
}
"""Config fields of GPT-2 and of what was made from its code, with the names that others have."""

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

EXPERT_PARTS: Mapping[str, str] = {
    **LLAMA_PARTS,
    "router": "layers.{i}.mlp.gate",
    "router.correction": "layers.{i}.mlp.gate.e_score_correction_bias",
    "expert_gate": "layers.{i}.mlp.experts.{e}.gate_proj",
    "expert_up": "layers.{i}.mlp.experts.{e}.up_proj",
    "expert_down": "layers.{i}.mlp.experts.{e}.down_proj",
    "shared_gate": "layers.{i}.mlp.shared_experts.gate_proj",
    "shared_up": "layers.{i}.mlp.shared_experts.up_proj",
    "shared_down": "layers.{i}.mlp.shared_experts.down_proj",
}
"""The same with experts, as DeepSeek and Qwen name them."""

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

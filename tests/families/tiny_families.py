"""Tiny models of every family, each with the features that its configs can switch on.

A variant is a config of transformers' own class, so it is as a published model would have it; its
weights are random and seeded, every one of them different from what a fresh model has, because
fresh biases are 0 and fresh norm weights 1, which would hide a forgotten one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

__all__ = ["VARIANTS", "Variant", "make", "variants"]

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

OPT_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}

OWN_HEAD: dict[str, Any] = {"tie_word_embeddings": False}
TIED_HEAD: dict[str, Any] = {"tie_word_embeddings": True}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Rotary positions, as configs ask for them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


VARIANTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    # family: what all its variants have, and what each of them changes
    "llama": (
        LLAMA_SIZES,
        {
            "grouped heads, a head of its own": OWN_HEAD,
            "tied head": TIED_HEAD,
            "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
            "as many key heads": {"num_key_value_heads": 4},
            "linear rope": rope("linear", factor=4.0),
            "dynamic rope": {"max_position_embeddings": 20, **rope("dynamic", factor=4.0)},
            "llama3 rope": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
            "yarn rope": rope("yarn", factor=4.0, original_max_position_embeddings=16),
            "yarn rope, untruncated": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                truncate=False,
                beta_fast=16.0,
                attention_factor=1.1,
            ),
        },
    ),
    "opt": (
        OPT_SIZES,
        {
            "125m": {},
            "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
            "2.7b (uneven heads)": {"hidden_size": 40, "num_attention_heads": 5},
            "galactica-6.7b": {"activation_function": "gelu"},
            "galactica-30b": {
                "activation_function": "gelu",
                "enable_bias": False,
                "layer_norm_elementwise_affine": False,
            },
            "no biases, norms with weights": {"enable_bias": False},
            "norms without weights after": {
                "layer_norm_elementwise_affine": False,
                "do_layer_norm_before": False,
            },
            "projected, norms before": {"word_embed_proj_dim": 48},
            "final norm removed": {"_remove_final_layer_norm": True},
            "head of its own": OWN_HEAD,
            "gelu by tanh": {"activation_function": "gelu_new"},
            "silu": {"activation_function": "silu"},
        },
    ),
}


@dataclass(frozen=True)
class Variant:
    """One tiny model of a family."""

    family: str
    name: str
    config: Mapping[str, Any] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def variants() -> Iterator[Variant]:
    """All of them."""
    for family, (base, changes) in VARIANTS.items():
        for name, change in changes.items():
            yield Variant(family, name, {**base, **change})


def make(variant: Variant, directory: Path) -> Any:
    """transformers' model of the variant in float32, saved to a directory in several shards."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(variant.family, **variant.config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.any():
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory, max_shard_size="50KB")
    return model

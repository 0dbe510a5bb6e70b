"""Tiny models of a family, made by transformers, each with other features of its configs.

A variant's config is one of transformers' own class, so it is as a published model would have it.
Weights are random and seeded, every one of them different from what a fresh model has: fresh biases
are 0 and fresh norm weights 1, which would hide a forgotten one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

__all__ = ["Variant", "make"]


@dataclass(frozen=True)
class Variant:
    """One tiny model of a family."""

    family: str
    """Its `model_type`."""
    name: str
    """What is special about it."""
    config: Mapping[str, Any] = field(repr=False)
    """Fields of transformers' config class. Keep it tiny: a vocabulary of about 100 tokens, three
    layers, 64 positions."""

    def __str__(self) -> str:
        return f"{self.family}: {self.name}"


def make(variant: Variant, directory: Path) -> Any:
    """transformers' model of the variant in float32, saved to a directory in several shards."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(variant.family, **variant.config)
    auto = (
        AutoModelForImageTextToText if "vision_config" in variant.config else AutoModelForCausalLM
    )
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
        for buffer in model.buffers():
            if buffer.is_floating_point() and not buffer.any():
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(directory, max_shard_size="50KB")
    return model

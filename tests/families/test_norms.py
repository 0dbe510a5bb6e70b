"""Norms round where those of transformers round, in a dtype of few bits.

Dimension key: T tokens, H heads, E features of a head, F features.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_families import Variant, variants
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from flexport.models import LatentAttention, ModelSpec, Norm, spec_of
from flexport.models.multimodal import MULTIMODAL
from flexport.models.ops import apply_norm

ALIKE = 0.999
"""Numbers that are the same bit for bit: all but where the last bit of a float32 sum, which depends
on its order, tips the rounding. Rounding once more, or elsewhere, changes one number in four."""


class NormWeights:
    """Those of one norm of transformers' model, or of several, one a head."""

    def __init__(self, modules: list[torch.nn.Module]) -> None:
        self._own = [dict(module.named_parameters()) for module in modules]

    def vector(self, slot: str) -> Tensor:
        tensors: list[Tensor] = [own[slot.rpartition(".")[2]] for own in self._own]
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors)


def norms_of(spec: ModelSpec) -> dict[str, tuple[Norm, tuple[int, ...]]]:
    """Norms by part: each with the shape of what it takes of one token."""
    norms: dict[str, tuple[Norm, tuple[int, ...]]] = {}
    if spec.final_norm:
        norms["final_norm"] = (spec.norm, (spec.hidden_size,))
    attention = spec.layers[0].attention
    if isinstance(attention, LatentAttention):
        norms["kv_norm"] = (attention.norm, (attention.latent_dim,))
    elif attention.head_norm is not None:
        whole = attention.head_norm.over == "all"
        shape = (attention.query_size,) if whole else (attention.num_heads, attention.head_dim)
        norms["q_norm"] = (attention.head_norm.norm, shape)
    return norms


def spec_and_config(variant: Variant) -> tuple[ModelSpec, Any]:
    config = AutoConfig.for_model(variant.family, **variant.config)
    return spec_of(config.to_dict()), config


def with_norms_of_their_own() -> Iterator[Variant]:
    """Of each family, the variants whose norms are not an earlier one's."""
    met = set()
    for variant in variants():
        if variant.family not in MULTIMODAL:
            spec, _ = spec_and_config(variant)
            key = (variant.family, *norms_of(spec).items())
            if key not in met:
                met.add(key)
                yield variant


@torch.no_grad()
@pytest.mark.parametrize("variant", list(with_norms_of_their_own()), ids=str)
def test_a_norm_is_that_of_transformers_bit_for_bit(variant):
    torch.manual_seed(0)
    spec, config = spec_and_config(variant)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)

    for part, (norm, shape) in norms_of(spec).items():
        name = next(n for n in spec.names[part] if n.startswith(model.base_model_prefix))
        heads = range(shape[0]) if "{h}" in name else range(1)
        modules = [model.get_submodule(name.format(i=0, h=head)) for head in heads]
        for parameter in (p for module in modules for p in module.parameters()):
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
        x = torch.randn(4000 // shape[-1], *shape).bfloat16()

        found = apply_norm(norm, NormWeights(modules), x, part)  # type: ignore[arg-type]

        pieces = x.split(1, 1) if len(modules) > 1 else (x,)
        theirs = [module(piece) for module, piece in zip(modules, pieces, strict=True)]
        expected = torch.cat(theirs, 1) if len(theirs) > 1 else theirs[0]
        assert found.dtype == torch.bfloat16
        assert (found == expected).float().mean() >= ALIKE, part

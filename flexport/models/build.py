"""The spec of a family's layers, with what all configs say alike: of tokens, sizes and the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flexport.models.config import Config
from flexport.models.naming import LLAMA_PARTS, PREFIXES, checkpoint_names
from flexport.models.spec import Layer, ModelSpec, Norm

__all__ = ["build_model"]


def build_model(
    fields: Config,
    layers: Sequence[Layer],
    norm: Norm,
    parts: Mapping[str, str] = LLAMA_PARTS,
    prefixes: Sequence[str] = PREFIXES,
    heads: Sequence[str] = ("lm_head",),
) -> ModelSpec:
    """The spec of these layers, with the rest of the config.

    `parts`, `prefixes` and `heads` are its names of tensors, as in `checkpoint_names`.
    """
    tied_head = fields.flag("tie_word_embeddings", False)
    ropes = [layer.attention.rope for layer in layers if layer.attention.rope is not None]
    return ModelSpec(
        family=fields.family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        layers=tuple(layers),
        norm=norm,
        max_positions=max(
            [fields.count("max_position_embeddings"), *(rope.reach for rope in ropes)]
        ),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(parts, prefixes, tied_head=tied_head, heads=heads),
    )

"""A family's layers one after the other, with no engine around them: whole weights, and no cache.

Dimension key: L tokens of a row, T all tokens laid end to end, D hidden features, H heads,
E features of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from flexport.backend import AttentionSpec
from flexport.engine.attend import common_to_rows
from flexport.engine.source import Source
from flexport.models import ModelSpec, layer_tensors
from flexport.models.decoder import decoder_layer, embed, head
from flexport.models.rope import Rope
from flexport.torch_ops.attention import attention

__all__ = ["WholeWeights", "draw_rows", "states_and_logits", "whole_state"]

LENGTHS = (7, 1, 40, 12)
"""Of the rows that are laid end to end."""


class WholeWeights:
    """A layer's weights, whole and in memory, found under their checkpoint names."""

    def __init__(self, spec: ModelSpec, layer: int, state: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        rows: dict[str, list[Tensor]] = {}
        for tensor in layer_tensors(spec, layer):
            values = state[next(name for name in tensor.names if name in state)]
            assert values.shape == tensor.file_shape, (tensor, values.shape)
            if tensor.slice_of is not None:
                values = values[tensor.slice_of[0]]
            if tensor.row is not None:
                assert tensor.row == len(rows.setdefault(tensor.slot, []))
                rows[tensor.slot].append(values)
            self._tensors[tensor.slot] = values.T if tensor.transposed else values
        self._tensors.update({slot: torch.stack(of_slot) for slot, of_slot in rows.items()})

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        weight_FD = self._tensors[f"{part}.weight"]
        return functional.linear(x_TD, weight_FD, self._tensors.get(f"{part}.bias"))

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        return [self.linear(x_TD, part) for part in parts]

    def vector(self, slot: str) -> Tensor:
        return self._tensors[slot]

    def matrix(self, part: str) -> Tensor:
        return self._tensors[f"{part}.weight"]

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        return self._tensors[f"{part}.weight"][ids_T]

    def experts(self, picked: Sequence[int]) -> Iterator[int]:
        return iter(picked)


class RowAttention:
    """Attention of each row over itself, with no cache."""

    def __init__(self, common: AttentionSpec, lengths: Sequence[int]) -> None:
        self._common = common
        self._lengths = list(lengths)

    def __call__(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor | None, sinks_H: Tensor | None
    ) -> Tensor:
        values = k_TKE if v_TKE is None else v_TKE
        rows = zip(*(x.split(self._lengths) for x in (q_THE, k_TKE, values)), strict=True)
        done = []
        for q, k, v in rows:
            q_1HLE, k_1KLE, v_1KLE = (x.transpose(0, 1)[None] for x in (q, k, v))
            spec = replace(self._common, length=len(q), sinks=sinks_H)
            done.append(attention(q_1HLE, [k_1KLE], [v_1KLE], spec)[0].transpose(0, 1))
        return torch.cat(done)


class RowTurns:
    """Each token's angles, token by token."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._tokens = [(place, length) for length in lengths for place in range(length)]

    def __call__(self, rope: Rope) -> tuple[Tensor, Tensor]:
        angles_TP = torch.stack(
            [place * torch.tensor(rope.at(length, length)) for place, length in self._tokens]
        )
        magnitude_T1 = torch.tensor([[rope.magnitude_at(place)] for place, _ in self._tokens])
        cos_TP, sin_TP = angles_TP.cos() * magnitude_T1, angles_TP.sin() * magnitude_T1
        return cos_TP[:, None], sin_TP[:, None]


def states_and_logits(source: Source, rows_L: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """All rows' states before each layer, and logits, laid end to end."""
    spec, lengths = source.spec, [len(row_L) for row_L in rows_L]
    state = whole_state(source)
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    turns = RowTurns(lengths)

    x_TD = embed(spec, WholeWeights(spec, 0, state), torch.cat(list(rows_L)), positions_T)
    states = []
    for index, layer in enumerate(spec.layers, start=1):
        states.append(x_TD.clone())
        attend = RowAttention(common_to_rows(layer.attention), lengths)
        weights = WholeWeights(spec, index, state)
        x_TD = decoder_layer(spec, layer, weights, x_TD, attend, turns)
    return states, head(spec, WholeWeights(spec, spec.head_layer, state), x_TD)


def whole_state(source: Source) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by its name."""
    assert source.files is not None
    state: dict[str, Tensor] = {}
    for path in {file.path for file in source.files.values()}:
        state.update(load_file(path))
    return state


def draw_rows(vocab_size: int) -> list[Tensor]:
    """Token ids of rows of several lengths."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in LENGTHS]

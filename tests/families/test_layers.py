"""Each family's layers give what transformers' layers give, within float32's rounding.

Dimension key: L tokens of a row, T all tokens laid end to end, D hidden features, H heads,
E features of a head, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import Variant, make, variants
from torch import Tensor
from torch.nn import functional

from flexport.backend import AttentionSpec
from flexport.engine.attend import common_to_rows
from flexport.engine.source import Source, open_source
from flexport.models import ModelSpec, layer_tensors
from flexport.models.decoder import decoder_layer, embed, head
from flexport.models.rope import Rope
from flexport.torch_ops.attention import attention

LENGTHS = (7, 1, 40, 12)

# float32 has 24 bits; three tiny layers in another order of summation lose a few of them.
TOLERANCE = 1e-4


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
    state = _state(source)
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


def _state(source: Source) -> dict[str, Tensor]:
    assert source.files is not None
    state: dict[str, Tensor] = {}
    for path in {file.path for file in source.files.values()}:
        state.update(load_file(path))
    return state


def draw_rows(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in LENGTHS]


@pytest.fixture(params=list(variants()), ids=str)
def variant(request: pytest.FixtureRequest) -> Variant:
    """Each tiny model in turn."""
    found: Variant = request.param
    return found


@torch.no_grad()
def test_ragged_rows_get_the_states_and_logits_that_transformers_gives_each_alone(
    variant, tmp_path
):
    model = make(variant, tmp_path)
    source = open_source(str(tmp_path), None, "auto")
    rows_L = draw_rows(source.spec.vocab_size)

    states, logits_TV = states_and_logits(source, rows_L)

    expected: list[Any] = [
        model(input_ids=row_L[None], output_hidden_states=True) for row_L in rows_L
    ]
    assert logits_TV.dtype == torch.float32
    for index, state_TD in enumerate(states):
        theirs_TD = torch.cat([out.hidden_states[index][0] for out in expected])
        torch.testing.assert_close(state_TD, theirs_TD, rtol=TOLERANCE, atol=TOLERANCE)
    theirs_TV = torch.cat([out.logits[0] for out in expected])
    torch.testing.assert_close(logits_TV, theirs_TV, rtol=TOLERANCE, atol=TOLERANCE)


@torch.no_grad()
def test_the_head_leaves_the_hidden_states_as_they_were(variant, tmp_path):
    make(variant, tmp_path)
    source = open_source(str(tmp_path), None, "auto")
    weights = WholeWeights(source.spec, source.spec.head_layer, _state(source))
    x_TD = torch.randn(5, source.spec.hidden_size)
    before_TD = x_TD.clone()

    head(source.spec, weights, x_TD)

    assert torch.equal(x_TD, before_TD)


def test_the_layers_own_every_tensor_of_the_checkpoint_once(variant, tmp_path):
    make(variant, tmp_path)
    source = open_source(str(tmp_path), None, "auto")
    spec = source.spec
    tensors = itertools.chain.from_iterable(
        layer_tensors(spec, layer) for layer in range(spec.num_schedule_layers)
    )

    owned = {name for tensor in tensors for name in tensor.names}

    saved = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
    assert {name for name in saved if not name.startswith(spec.unused)} <= owned

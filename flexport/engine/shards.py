"""Which rows of which tensor are at home where, and how they lie in the files they stream from.

Dimension key: B bytes, R rows of a part, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexport.engine.stored import Stored
from flexport.models.spec import ModelSpec
from flexport.models.tensors import TensorSpec, is_projection, owned_tensors
from flexport.planner.footprint import layer_splits
from flexport.policy import Split, Tier
from flexport.store.place import Dealer
from flexport.store.store import FileRun, Kept
from flexport.torch_ops import as_tensor, torch_dtype

__all__ = ["Bundle", "Shard", "decode", "dtype_in_use", "place_weights", "stored_dtype"]

MERGE_BYTES = 8 << 10
"""Ranges of a file closer than this are read as one. Reading them apart would take as much memory,
each end being rounded to an aligned place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Some rows of one tensor, at home on one tier."""

    stored: Stored
    begin: int
    end: int
    tier: Tier

    @property
    def tensor(self) -> TensorSpec:
        """The tensor."""
        return self.stored.tensor

    @property
    def slot(self) -> str:
        """The tensor's name in its layer."""
        return self.stored.tensor.slot

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        return (self.end - self.begin, *self.stored.shape[1:])

    @property
    def first_row(self) -> int:
        """The first of these rows, counted as the slot's."""
        return self.begin + (self.tensor.row or 0)

    @property
    def dtype(self) -> str | None:
        """What its numbers are stored as; None if they are packed."""
        return None if self.stored.is_packed else self.stored.files[0].dtype

    @property
    def runs(self) -> tuple[FileRun, ...]:
        """Where its bytes lie, part by part."""
        runs = []
        for part, file in zip(self.stored.layout.parts, self.stored.files, strict=True):
            first, last = part.lines(self.begin, self.end)
            line_bytes = file.num_bytes // part.num_lines
            runs.append(
                FileRun(
                    path=file.path,
                    offset_bytes=file.offset_bytes + first * line_bytes,
                    num_bytes=(last - first) * line_bytes,
                )
            )
        return tuple(runs)

    @property
    def num_bytes(self) -> int:
        """All its parts."""
        return sum(run.num_bytes for run in self.runs)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of a tensor that is not packed."""
        return self.num_bytes // (self.end - self.begin)

    def part_shapes(self) -> list[tuple[tuple[int, ...], str]]:
        """Shape and dtype of its lines of each part."""
        shapes = []
        for part, file in zip(self.stored.layout.parts, self.stored.files, strict=True):
            first, last = part.lines(self.begin, self.end)
            shapes.append(((last - first, *part.shape[1:]), file.dtype))
        return shapes


def place_weights(
    spec: ModelSpec,
    stored: Callable[[TensorSpec], Stored],
    split: Split,
    *,
    projections_on_host: bool = False,
) -> list[list[Shard]]:
    """The shards of each layer of the schedule, by the weight split.

    With projections_on_host, what is on the host of a layer is first of all what the CPU can
    multiply with.
    """
    found_layers = [
        [stored(tensor) for tensor in owned_tensors(spec, layer)]
        for layer in range(spec.num_schedule_layers)
    ]
    sizes = [sum(each.num_bytes for each in found) for found in found_layers]
    dealers: dict[Split, Dealer] = {}
    layers = []
    for found, own in zip(found_layers, layer_splits(sizes, split), strict=True):
        dealer = dealers.setdefault(own, Dealer(own))
        # Vectors first: they are the last that should stream, being used by every visit.
        ordered = sorted(found, key=lambda each: each.tensor.kind not in ("norm", "bias"))
        if projections_on_host:
            ordered = _with_projections_after(ordered, own.device)
        cuts = [-(-each.shape[0] // each.layout.rows_per_cut) for each in ordered]
        parts = dealer.cut(
            [(num, each.num_bytes // num) for num, each in zip(cuts, ordered, strict=True)]
        )
        layers.append(
            [
                Shard(
                    stored=each,
                    begin=part.begin * each.layout.rows_per_cut,
                    end=min(part.end * each.layout.rows_per_cut, each.shape[0]),
                    tier=part.tier,
                )
                for part in parts
                for each in (ordered[part.index],)
            ]
        )
    return layers


def _with_projections_after(ordered: Sequence[Stored], share: float) -> list[Stored]:
    """The same, with query, key and value matrices right after the first `share` of the bytes."""
    others = [each for each in ordered if not is_projection(each.tensor)]
    projections = [each for each in ordered if is_projection(each.tensor)]
    before_bytes = share * sum(each.num_bytes for each in ordered)
    at = 0
    while at < len(others) and before_bytes > 0:
        before_bytes -= others[at].num_bytes
        at += 1
    return [*others[:at], *projections, *others[at:]]


class Bundle:
    """Shards of one layer that stream together, and where each lies in their bytes."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = list(shards)
        wanted = sorted(
            ((run, number, part) for number, shard in enumerate(shards)
             for part, run in enumerate(shard.runs)),
            key=lambda each: (str(each[0].path), each[0].offset_bytes),
        )  # fmt: skip
        runs: list[FileRun] = []
        self._places: dict[tuple[int, int], tuple[int, int]] = {}
        """Of each part of each shard, the run that it is in and where."""
        for run, *key in wanted:
            number, part = key
            end = run.offset_bytes + run.num_bytes
            if runs and runs[-1].path == run.path:
                gap_bytes = run.offset_bytes - (runs[-1].offset_bytes + runs[-1].num_bytes)
                if gap_bytes <= MERGE_BYTES:
                    start = runs[-1].offset_bytes
                    runs[-1] = FileRun(path=run.path, offset_bytes=start, num_bytes=end - start)
                    self._places[number, part] = (len(runs) - 1, run.offset_bytes - start)
                    continue
            runs.append(run)
            self._places[number, part] = (len(runs) - 1, 0)
        self.runs = tuple(runs)

    def views(self, bytes_B: Tensor, kept: Kept) -> list[tuple[Shard, list[Tensor]]]:
        """Each shard's parts in the bundle's bytes, as they are stored."""
        views = []
        for number, shard in enumerate(self.shards):
            parts = []
            for part, (shape, dtype) in enumerate(shard.part_shapes()):
                run, offset_bytes = self._places[number, part]
                start = kept.starts_bytes[run] + offset_bytes
                parts.append(as_tensor(bytes_B, start, shape, torch_dtype(dtype)))
            views.append((shard, parts))
        return views


def decode(shard: Shard, parts: Sequence[Tensor], out_RD: Tensor) -> Tensor:
    """The shard's numbers in out_RD's memory and dtype; a packed one's may lie in another order."""
    packing = shard.stored.format
    return out_RD.copy_(parts[0]) if packing is None else packing.decode(parts, out_RD, shard.begin)


def dtype_in_use(shard: Shard, dtype: torch.dtype) -> torch.dtype:
    """What a shard is computed with in, in a run that computes in `dtype`."""
    return stored_dtype(shard) if shard.stored.is_exact else dtype


def stored_dtype(shard: Shard) -> torch.dtype:
    """What the numbers of a shard that is not packed are stored as."""
    assert shard.dtype is not None, shard
    return torch_dtype(shard.dtype)

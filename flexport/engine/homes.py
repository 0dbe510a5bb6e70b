"""One layer's weights at home: what stays on the device, what streams, and from where.

`engine.weights` fills these records when a run opens, and `engine.layer_lease` goes by them in every
sweep; that is all that the two share.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexport.backend import PackedMatrix
from flexport.codecs.compressed import Int4Tiles, Int8Rows
from flexport.engine.experts import Moving
from flexport.engine.shards import Bundle, Shard, dtype_in_use, stored_dtype
from flexport.store.pool import Buffer, Pool
from flexport.store.store import Kept, Store

__all__ = ["LayerHome", "Packed", "Parts", "Stream", "Weight", "moving"]

Stream = tuple[Bundle, Kept]
"""What streams together, and where it is at home."""


@dataclass(frozen=True, slots=True, eq=False)
class Packed:
    """A shard whose numbers are packed, on the device."""

    shard: Shard
    parts: Sequence[Tensor]
    decoded: list[Buffer]
    """Where the memory is noted that its numbers take, once somebody needs these."""

    @property
    def matrix(self) -> PackedMatrix | None:
        """The same for a backend; None in forms that none multiplies with."""
        form, shape = self.shard.stored.format, self.shard.shape
        if isinstance(form, Int8Rows | Int4Tiles):
            return form.matrix(self.parts, (shape[0], shape[1]))
        return None


Weight = Tensor | PackedMatrix | Packed
"""Numbers, or a matrix that is settled, or one that may have to be decoded."""

Parts = dict[str, list[tuple[int, Weight]]]
"""By slot, weights on the device, each with the first row that it has of the whole."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerHome:
    """Where each of a layer's shards rests between sweeps."""

    shards: Sequence[Shard]
    resident: Parts = field(default_factory=lambda: defaultdict(list))
    """What is computed with where it lies."""
    streams: list[Stream] = field(default_factory=list)
    """What comes in every sweep."""
    experts: dict[int, list[Stream]] = field(default_factory=dict)
    """What streams of each expert, of those that do not stay as a whole."""
    projections: list[Stream] = field(default_factory=list)
    """What streams, unless the CPU multiplies with it on the host."""
    on_host: dict[Shard, Tensor] = field(default_factory=dict)
    """The numbers of what is at home on the host and not packed."""
    transposed: frozenset[str] = field(init=False)
    """Slots of matrices that lie as (features in, features out)."""

    def __post_init__(self) -> None:
        turned = frozenset(shard.slot for shard in self.shards if shard.stored.transposed)
        object.__setattr__(self, "transposed", turned)

    def streamed(self, *, on_host: bool) -> list[Stream]:
        """What comes in a sweep; with `on_host`, the CPU multiplies with what it can."""
        return [*self.streams, *([] if on_host else self.projections)]

    def projections_on_host(self) -> dict[str, list[tuple[int, Tensor]]]:
        """What the CPU multiplies with, by slot, each with the first row that it has of the whole."""
        parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for bundle, _ in self.projections:
            for shard in bundle.shards:
                parts[shard.slot].append((shard.begin, self.on_host[shard]))
        return parts


def moving(store: Store, streams: Sequence[Stream], dtype: torch.dtype) -> Moving:
    """How some bundles stream in a run that computes in `dtype`."""
    staging = [store.staging_bytes(kept) for _, kept in streams]
    return Moving(
        device_bytes=sum(for_device for for_device, _ in staging),
        host_bytes=sum(for_host for _, for_host in staging),
        decoded_bytes=sum(_decoded_bytes(bundle.shards, dtype) for bundle, _ in streams),
        start=lambda: [store.fetch(kept) for _, kept in streams],
    )


def _decoded_bytes(shards: Sequence[Shard], dtype: torch.dtype) -> int:
    """What copies take of the shards that are not computed with as they are in the file."""
    return sum(
        Pool.rounded(math.prod(shard.shape) * dtype.itemsize)
        for shard in shards
        if shard.stored.is_packed or stored_dtype(shard) != dtype_in_use(shard, dtype)
    )

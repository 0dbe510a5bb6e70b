"""Decode steps that look at all keys and add up few values, wherever these are at home.

A step is taken in turns with the others of its visit, so that the device, the CPU and the links
work at the same time: when it is made, the weights are worked out and columns are chosen; `ask`
hears of the choice on the host and lets what has to be read from disk set out; `take` puts the
chosen values side by side in host memory and sends them up; `result` adds up.

Values that lie where the step is computed are not moved: there the others get no weight. Of those
in host memory only chosen ones cross the link. From disk come the grains that hold chosen ones, and
what lies between two of them where that takes less time than a read of its own.

Dimension key: N rows of a band, H query heads, K key/value heads, M columns, J chosen columns of a
row and head, E features of a head, P chosen lines of values, B bytes of one or of all, R reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Ticket
from flexport.codecs.cache_groups import decode
from flexport.engine.cache import BatchCache, Held
from flexport.engine.packed_pages import ValueLines
from flexport.policy import Tier
from flexport.store.direct_io import ALIGNMENT
from flexport.store.lanes import DONE
from flexport.store.pool import Buffer
from flexport.store.store import Lease, Store
from flexport.torch_ops import as_tensor
from flexport.torch_ops.attention import step_weights
from flexport.torch_ops.sparse_attention import (
    chosen_columns,
    kept_weights,
    num_kept,
    num_seen,
    sum_of_lines,
    sum_of_pages,
)

__all__ = ["SparseStep", "Sparsity", "reads_of"]

READ_ACROSS_BYTES = 32 << 10
"""What lies between two chosen grains is read with them if it is less. On a virtual NVMe disk a read
takes 50 us, be it of 4 KiB or of 64, and one of 1 MiB 420; five at a time."""

_UNITS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
"""To copy lines in: scattering bytes one by one is eight times slower than eight at once."""


@dataclass(slots=True, eq=False)
class Sparsity:
    """What share of the values a job's steps add up, and what it spared."""

    share: float
    store: Store
    value_bytes_whole: int = 0
    """Values of complete pages that steps had need of and that were elsewhere, once for each link
    that would have moved them."""
    value_bytes_moved: int = 0
    """What did move in their place."""

    def to_dict(self) -> dict[str, int]:
        """Plain data, for the report."""
        return {
            "value_bytes_whole": self.value_bytes_whole,
            "value_bytes_moved": self.value_bytes_moved,
            "value_bytes_saved": self.value_bytes_whole - self.value_bytes_moved,
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Picks:
    """Lines of one page that were chosen: where they begin in a lease's bytes, and where they go."""

    lease: Lease
    begins_P: Tensor
    places_P: Tensor


class SparseStep:
    """One band's step. Its rounds are called one after the other, each once."""

    def __init__(
        self,
        sparsity: Sparsity,
        cache: BatchCache,
        held: Held,
        q_NHE: Tensor,
        spec: AttentionSpec,
        live: Sequence[int],
    ) -> None:
        """Work out the weights and choose; the new keys and values are in their page already.

        `live` are the band's rows whose result is wanted; those of others are undefined.
        """
        self._sparsity = sparsity
        self._store = sparsity.store
        self._cache = cache
        self._held = held
        weights = []
        for first, last, keys, _ in cache.unpacked(held, "keys"):
            starts = None if spec.starts is None else spec.starts[first:last]
            own = replace(spec, starts=starts)
            weights.append(step_weights(q_NHE[first:last].unsqueeze(2), keys, own))
        weights_NHM = _joined(weights)
        del weights
        kept_N = [0] * len(q_NHE)
        seen_N = num_seen(spec, len(q_NHE))
        for row in live:
            kept_N[row] = num_kept(sparsity.share, seen_N[row])
        band = held.band
        self._columns_NKJ = chosen_columns(weights_NHM, band.shape.num_kv_heads, kept_N)
        self._weights_NHM = kept_weights(weights_NHM, self._columns_NKJ)
        self._first = band.edges[min(held.leases)]
        self._num_far = band.edges[min(held.leases.keys() - held.far)] - self._first
        """Columns whose values are elsewhere."""
        self._picks: list[_Picks] = []
        self._values: Lease | None = None
        """Lines of values for the columns, side by side."""
        self._heard: tuple[Tensor, Ticket, Buffer] | None = None
        if held.far and not self._computes_in_host_memory:
            self._heard = self._tell(self._columns_NKJ)

    def ask(self) -> None:
        """Hear what was chosen, and start reading what is on disk of it."""
        if not self._held.far:
            return
        columns_NKJ = self._columns_NKJ
        if self._heard is not None:
            columns_NKJ, ticket, _ = self._heard
            ticket.join()
        is_far_NKJ = (columns_NKJ >= 0) & (columns_NKJ < self._num_far)
        # Columns are in rising order, so those that are far are each row's and head's first.
        most = int(is_far_NKJ.sum(2).max())
        self._columns_NKJ = self._columns_NKJ[:, :, :most]
        for number in sorted(self._held.far):
            self._pick(number, columns_NKJ[:, :, :most])
        if self._heard is not None:
            self._store.host.give_back(self._heard[2])
            self._heard = None

    def take(self) -> None:
        """Put the chosen values side by side, and send them to where the step is computed."""
        if not self._picks:
            return
        line_bytes = self._lines(min(self._held.far)).line_bytes
        num_bytes = self._columns_NKJ.numel() * line_bytes
        host = self._store.host.take(num_bytes, self._store.wait_for_a_write)
        unit = _UNITS[math.gcd(line_bytes, 8)]
        lines_PB = host.bytes_B[:num_bytes].view(-1, line_bytes).view(unit).zero_()
        for picks in self._picks:
            picks.lease.ticket.join()
            bytes_B = picks.lease.bytes_B
            # Each of these bytes as the first one of a line.
            every_PB = bytes_B.as_strided((len(bytes_B) - line_bytes + 1, line_bytes), (1, 1))
            lines_PB[picks.places_P] = every_PB.index_select(0, picks.begins_P).view(unit)
            picks.lease.release()
        self._picks.clear()
        near, pools = host, [(self._store.host, host)]
        ticket: Ticket = DONE
        if not self._computes_in_host_memory:
            near = self._store.device.take(num_bytes, self._store.wait_for_a_write)
            pools.append((self._store.device, near))
            ticket = self._store.copy(
                "host_to_device", host.bytes_B[:num_bytes], near.bytes_B[:num_bytes]
            )
            self._sparsity.value_bytes_moved += num_bytes
        self._values = Lease(near.bytes_B[:num_bytes], ticket, pools)

    def result(self) -> Tensor:
        """What came out, (N, H, E), where the step is computed."""
        parts = []
        for first, last, _, values in self._cache.unpacked(self._held, "values"):
            own_NHM = self._weights_NHM[first:last, :, self._num_far :]
            parts.append(sum_of_pages(own_NHM, values))
        sums_NHE = _joined(parts)
        if self._values is not None:
            self._values.ticket.wait()
            values_NKJE = self._decoded(self._values.bytes_B)
            sums_NHE.add_(sum_of_lines(self._weights_NHM, self._columns_NKJ, values_NKJE))
            self._values.release()
        return sums_NHE.to(self._held.band.shape.dtype)

    # ---- inside

    @property
    def _computes_in_host_memory(self) -> bool:
        return self._held.near is Tier.HOST or self._store.backend.capabilities.addressable

    def _tell(self, columns_NKJ: Tensor) -> tuple[Tensor, Ticket, Buffer]:
        """Start copying device tensors to the host."""
        num_bytes = columns_NKJ.numel() * columns_NKJ.dtype.itemsize
        buffer = self._store.host.take(num_bytes, self._store.wait_for_a_write)
        told_NKJ = as_tensor(buffer.bytes_B, 0, columns_NKJ.shape, columns_NKJ.dtype)
        return told_NKJ, self._store.copy("device_to_host", columns_NKJ, told_NKJ), buffer

    def _lines(self, number: int) -> ValueLines:
        band = self._held.band
        low, high = band.edges[number : number + 2]
        return band.form(number).value_lines(len(band.rows), high - low)

    def _pick(self, number: int, columns_NKJ: Tensor) -> None:
        """Find the chosen columns of a page that is far, and let them set out from disk."""
        band, lines = self._held.band, self._lines(number)
        low = band.edges[number] - self._first
        kept, sparsity = band.pages[number], self._sparsity
        num_links = (kept.home is Tier.DISK) + (not self._computes_in_host_memory)
        sparsity.value_bytes_whole += num_links * len(band.rows) * lines.row_bytes
        places_P3 = ((columns_NKJ >= low) & (columns_NKJ < low + lines.width)).nonzero()
        if not len(places_P3):
            return
        n, k, j = places_P3.unbind(1)
        line_P = k * lines.width + columns_NKJ[n, k, j] - low
        begins_P = lines.first_byte + n * lines.row_bytes + line_P * lines.line_bytes
        ranges = None
        if kept.home is Tier.DISK:
            ranges, begins_P = reads_of(begins_P, lines.line_bytes)
            sparsity.value_bytes_moved += sum(num_bytes for _, num_bytes in ranges)
        _, num_heads, most = columns_NKJ.shape
        lease = self._store.fetch(kept, ranges, Tier.HOST)
        self._picks.append(_Picks(lease, begins_P, (n * num_heads + k) * most + j))

    def _decoded(self, lines_B: Tensor) -> Tensor:
        """Lines of values as the numbers that they stand for, (N, K, J, E)."""
        shape = self._held.band.shape
        if shape.packed is None:
            return lines_B.view(shape.dtype).view(*self._columns_NKJ.shape, shape.head_dim)
        groups = shape.packed.planes[1].groups
        packed_NKJPB = lines_B.view(*self._columns_NKJ.shape, -1, groups.group_bytes)
        values_NKJE = torch.empty(
            (*self._columns_NKJ.shape, shape.head_dim), dtype=shape.dtype, device=lines_B.device
        )
        decode(packed_NKJPB, values_NKJE, groups)
        return values_NKJE


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def reads_of(begins_P: Tensor, line_bytes: int) -> tuple[list[tuple[int, int]], Tensor]:
    """What to read so that some lines come, and where these then begin.

    `begins_P` are their first bytes, in rising order. Gives (first byte, number of bytes) of reads in
    whole grains, and the lines' first bytes in what is read, end to end.
    """
    first_P = begins_P // ALIGNMENT * ALIGNMENT
    stop_P = (begins_P + line_bytes - 1) // ALIGNMENT * ALIGNMENT + ALIGNMENT
    # A line that begins far enough behind the one before it begins a read.
    is_new_P = torch.ones(len(begins_P), dtype=torch.bool)
    is_new_P[1:] = first_P[1:] - stop_P[:-1] >= READ_ACROSS_BYTES
    read_P = is_new_P.cumsum(0) - 1
    first_R = first_P[is_new_P]
    size_R = stop_P[is_new_P.roll(-1)] - first_R
    moved_R = size_R.cumsum(0) - size_R - first_R
    return list(zip(first_R.tolist(), size_R.tolist(), strict=True)), begins_P + moved_R[read_P]

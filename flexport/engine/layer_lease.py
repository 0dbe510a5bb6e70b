"""One layer's weights during one sweep: streamed to the device, decoded once, multiplied with.

What has come joins what is resident: a tensor is a list of parts, each with the first row that it
has of the whole. A packed part is multiplied with as it is where the backend can do that, and is
decoded when somebody needs its numbers. Experts come while they are computed with, each for as
long as it is.

Dimension key: T tokens, D features in, F features out or of a table's row, R rows of a part.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from flexport.backend import Backend, MultipliesPacked, PackedMatrix
from flexport.engine.experts import ExpertStream, ExpertWindow
from flexport.engine.homes import LayerHome, Packed, Parts, Weight, moving
from flexport.engine.host_compute import HostCompute
from flexport.engine.shards import Bundle, Shard, decode, dtype_in_use
from flexport.store.pool import Buffer
from flexport.store.store import Kept, Lease, Store
from flexport.torch_ops import as_tensor

__all__ = ["LayerLease"]

_Came = tuple[Bundle, Kept, Lease]
"""What streams together, where it is at home, and its bytes on the device."""


class LayerLease:
    """One layer's weights during one sweep: what `models.decoder.Weights` asks for."""

    def __init__(
        self,
        home: LayerHome,
        store: Store,
        dtype: torch.dtype,
        rows: Callable[[str, Tensor], Tensor],
        *,
        host: HostCompute | None = None,
        window: ExpertWindow | None = None,
    ) -> None:
        """Start what streams of the layer; given a CPU, without what that multiplies with.

        `rows` reads a table by rows, `window` is what experts come through that do not stay.
        """
        self._home = home
        self._store = store
        self._backend: Backend = store.backend
        self._dtype = dtype
        self._rows = rows
        self._host = host
        self._leases: Sequence[_Came] = [
            (bundle, kept, store.fetch(kept))
            for bundle, kept in home.streamed(on_host=host is not None)
        ]
        self._on_host = home.projections_on_host() if host is not None else {}
        """Parts of matrices that the CPU multiplies with."""
        self._stream: ExpertStream | None = None
        if window is not None and home.experts:
            self._stream = ExpertStream(
                window,
                {expert: moving(store, own, dtype) for expert, own in home.experts.items()},
            )
        self._decoded: list[Buffer] = []
        self._tokens: Counter[str] = Counter()
        """Of each slot that is packed, what it was multiplied with so far."""
        self._parts: Parts | None = None
        """Parts of each tensor on the device, each with its first row, in their order."""
        self.stays = False
        """Whether another visit of the sweep will come."""

    def wait(self) -> None:
        """Order what is computed from now on after the streams, and decode what they brought."""
        if self._parts is not None:
            return
        parts: Parts = {slot: list(tensors) for slot, tensors in self._home.resident.items()}
        self._arrive(parts, self._leases, self._decoded)
        self._parts = parts

    join = wait

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        """x @ weight.T, plus the bias if there is one: (T, F)."""
        return self.linears(x_TD, (part,))[0]

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        """The same for several parts; x crosses to the CPU once, while the device computes."""
        far = [(part, *own) for part in parts for own in self._on_host.get(f"{part}.weight", ())]
        crossing = self._host.send([x_TD]) if self._host is not None and far else None
        pieces = self._near_products(x_TD, parts)
        if crossing is not None and self._host is not None:
            (x_on_host_TD,) = crossing.receive()
            for part, begin, weight_RD in far:
                out_TR = x_TD.new_empty(x_TD.shape[0], weight_RD.shape[0])
                self._host.bring(self._host.matmul(x_on_host_TD, weight_RD), out_TR)
                bias_F = self._bias(part)
                if bias_F is not None:
                    out_TR += bias_F[begin : begin + weight_RD.shape[0]]
                pieces[part].append((begin, out_TR))
            crossing.release()
        return [_side_by_side(pieces[part]) for part in parts]

    def _near_products(
        self, x_TD: Tensor, parts: Sequence[str]
    ) -> dict[str, list[tuple[int, Tensor]]]:
        """What the device computes of each product, in pieces with their first features."""
        pieces: dict[str, list[tuple[int, Tensor]]] = {part: [] for part in parts}
        packed: list[tuple[str, int, PackedMatrix, Tensor | None]] = []
        for part in parts:
            bias_F, shards = self._bias(part), self._for_product(f"{part}.weight", len(x_TD))
            if f"{part}.weight" in self._home.transposed:
                pieces[part] = [(0, self._sum_of_products(x_TD, shards, bias_F))]
                continue
            for begin, weight in shards:
                bias_R = None if bias_F is None else bias_F[begin : begin + weight.shape[0]]
                if isinstance(weight, PackedMatrix):
                    packed.append((part, begin, weight, bias_R))
                else:
                    pieces[part].append((begin, self._backend.matmul(x_TD, weight, bias_R)))
        if packed:
            assert isinstance(self._backend, MultipliesPacked), self._backend
            names, begins, matrices, biases = zip(*packed, strict=True)
            products = self._backend.matmul_packed(x_TD, matrices, biases)
            for part, begin, product_TR in zip(names, begins, products, strict=True):
                pieces[part].append((begin, product_TR))
        return pieces

    def _for_product(self, slot: str, num_tokens: int) -> list[tuple[int, Tensor | PackedMatrix]]:
        """A matrix's parts, decoded where the backend does not multiply so many tokens with them."""
        parts = self._all().get(slot, [])
        is_packed = any(isinstance(weight, Packed) for _, weight in parts)
        if is_packed:
            self._tokens[slot] += num_tokens
        taken: list[tuple[int, Tensor | PackedMatrix]] = []
        for number, (begin, weight) in enumerate(parts):
            if isinstance(weight, Packed):
                own = weight.matrix
                if own is None or not self._multiplies(own, self._tokens[slot]):
                    own_RD = self._decoded_values(weight)
                    parts[number] = (begin, own_RD)
                    taken.append((begin, own_RD))
                else:
                    taken.append((begin, own))
            else:
                taken.append((begin, weight))
        return taken

    def _multiplies(self, matrix: PackedMatrix, num_tokens: int) -> bool:
        backend = self._backend
        return isinstance(backend, MultipliesPacked) and backend.multiplies(
            matrix.form, self._dtype, num_tokens
        )

    def _sum_of_products(
        self,
        x_TD: Tensor,
        shards: Sequence[tuple[int, Tensor | PackedMatrix]],
        bias_F: Tensor | None,
    ) -> Tensor:
        """The product with a matrix that is cut by features in."""
        total_TF: Tensor | None = None
        for begin, weight_FR in shards:
            assert isinstance(weight_FR, Tensor), "what flexport packs lies by features out"
            x_TR = x_TD[:, begin : begin + weight_FR.shape[1]]
            product_TF = self._backend.matmul(x_TR, weight_FR, bias_F)
            total_TF, bias_F = product_TF if total_TF is None else total_TF.add_(product_TF), None
        assert total_TF is not None, "a matrix without shards"
        return total_TF

    def _bias(self, part: str) -> Tensor | None:
        return self.vector(f"{part}.bias") if f"{part}.bias" in self._all() else None

    def vector(self, slot: str) -> Tensor:
        """A whole vector."""
        return self._whole(slot)

    def matrix(self, part: str) -> Tensor:
        """A whole matrix that the backend did not pack."""
        return self._whole(f"{part}.weight")

    def experts(self, picked: Sequence[int]) -> Iterator[int]:
        """The experts of `picked`, each when its parts can be used, until the next is asked for."""
        if self._stream is None:
            yield from picked
            return
        window = self._stream.window
        arrivals = self._stream.arrivals(picked, stay=self.stays)
        for expert, leases in zip(picked, arrivals, strict=True):
            streams = self._home.experts.get(expert, ())
            came = [(*stream, lease) for stream, lease in zip(streams, leases, strict=True)]
            slots = {shard.slot for bundle, _, _ in came for shard in bundle.shards}
            decoded_bytes = moving(self._store, streams, self._dtype).decoded_bytes
            window.decoded.draw(decoded_bytes)
            before = {slot: self._all().get(slot) for slot in slots}
            decoded: list[Buffer] = []
            try:
                self._arrive(self._all(), came, decoded)
                yield expert
            finally:
                self._give_back(decoded)
                window.decoded.add(decoded_bytes)
            for slot, parts in before.items():
                if parts is None:
                    del self._all()[slot]
                else:
                    self._all()[slot] = parts

    def begin_experts(self) -> None:
        """Let them come before they are picked."""
        assert self._stream is not None, "no expert streams"
        self._stream.begin()

    def _arrive(
        self,
        parts: Parts,
        came: Sequence[_Came],
        decoded: list[Buffer],
    ) -> None:
        """Add to `parts` what has come, decoded; order what is computed from now on after it."""
        for bundle, kept, lease in came:
            lease.ticket.wait()
            for shard, views in bundle.views(lease.bytes_B, kept):
                slot, weight = shard.slot, self._arrived(shard, views, decoded)
                own = [*parts.get(slot, ()), (shard.first_row, weight)]
                parts[slot] = sorted(own, key=lambda part: part[0])

    def _arrived(self, shard: Shard, views: Sequence[Tensor], decoded: list[Buffer]) -> Weight:
        """What has come, in the dtype computed in unless it is packed."""
        if shard.stored.is_packed:
            return Packed(shard, views, decoded)
        values = views[0]
        if values.dtype != dtype_in_use(shard, self._dtype):
            values = self._decode(shard, views, decoded)
        return values.T if shard.stored.transposed else values

    def _decoded_values(self, packed: Packed) -> Tensor:
        values = self._decode(packed.shard, packed.parts, packed.decoded)
        return values.T if packed.shard.stored.transposed else values

    def _whole(self, slot: str) -> Tensor:
        values = []
        for _, weight in self._all()[slot]:
            assert not isinstance(weight, PackedMatrix), f"{slot} is settled for products"
            values.append(self._decoded_values(weight) if isinstance(weight, Packed) else weight)
        # Of a transposed matrix, parts follow each other along features in.
        along = 1 if slot in self._home.transposed else 0
        whole = values[0] if len(values) == 1 else torch.cat(values, along)
        self._all()[slot] = [(0, whole)]
        return whole

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, (T, F) on the device; `ids_T` is int64 in host memory."""
        return self._rows(part, ids_T)

    @property
    def decoded_bytes(self) -> int:
        """What decoded copies take now, those of experts left out."""
        return sum(buffer.num_bytes for buffer in self._decoded)

    def release(self) -> None:
        """The sweep has left this layer."""
        self._parts = None
        self._give_back(self._decoded)
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        for _, _, lease in self._leases:
            lease.release()
        self._leases = ()

    def _all(self) -> Parts:
        assert self._parts is not None, "the weights were not waited for"
        return self._parts

    def _give_back(self, decoded: list[Buffer]) -> None:
        for buffer in decoded:
            self._store.device.give_back(buffer)
        decoded.clear()

    def _decode(self, shard: Shard, parts: Sequence[Tensor], decoded: list[Buffer]) -> Tensor:
        buffer = self._store.device.take(math.prod(shard.shape) * self._dtype.itemsize)
        decoded.append(buffer)
        return decode(shard, parts, as_tensor(buffer.bytes_B, 0, shard.shape, self._dtype))


def _side_by_side(pieces: list[tuple[int, Tensor]]) -> Tensor:
    """Parts of a product, each with its first feature, as one tensor."""
    if len(pieces) == 1:
        return pieces[0][1]
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda part: part[0])], dim=-1)

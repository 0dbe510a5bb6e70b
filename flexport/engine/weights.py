"""A model's weights over the tiers: loaded once or streamed every sweep, decoded once a sweep.

Each layer is cut by the weight split into resident and streamed parts. Resident parts are read
and decoded once, when the run opens (and packed for the backend's kernel where it can do that);
streamed ones come as at most two bundles a layer and sweep, one from the host and one from
disk: the byte ranges of the checkpoint's own files, read in place. Tables that are only read by
rows (token and position embeddings) never stream: the rows in need are fetched. Where a CPU stands
beside the device and the policy has it project, what is at home on the host of the query, key and
value matrices streams in sweeps with prompts only; in others the CPU multiplies with it there.

Dimension key: T tokens, D features in, F features out or of a table's row, R rows of a part.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexport.backend import Backend, MultipliesPacked, PackedMatrix, PacksWeights
from flexport.codecs.compressed import Int4Tiles, Int8Rows
from flexport.engine.experts import ExpertStream, ExpertWindow, Moving, will_pick_nearly_all
from flexport.engine.host_compute import HostCompute
from flexport.engine.shards import Bundle, Shard, decode
from flexport.engine.transfer import to_device
from flexport.models.spec import Experts, ModelSpec
from flexport.models.tensors import is_projection
from flexport.planner.footprint import expert_window_bytes
from flexport.policy import Tier
from flexport.store.pool import Buffer, Pool
from flexport.store.store import Kept, Lease, Store
from flexport.torch_ops import as_tensor, torch_dtype

__all__ = ["LayerLease", "ModelWeights"]

_Stream = tuple[Bundle, Kept]
"""What streams together, and where it is at home."""


@dataclass(frozen=True, slots=True, eq=False)
class _Packed:
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


_Weight = Tensor | PackedMatrix | _Packed
"""Numbers, or a matrix that is settled, or one that may have to be decoded."""

_Parts = dict[str, list[tuple[int, _Weight]]]
"""By slot, weights on the device, each with the first row that it has of the whole."""


class ModelWeights:
    """All layers' weights; open for as long as the run."""

    def __init__(
        self,
        spec: ModelSpec,
        layers: Sequence[Sequence[Shard]],
        store: Store,
        dtype: torch.dtype,
        *,
        cpu_projections: bool = False,
    ) -> None:
        self.spec = spec
        self._cpu_projections = cpu_projections
        self._store = store
        self._backend = store.backend
        self._dtype = dtype
        self._shards = layers
        self._resident: list[_Parts] = [defaultdict(list) for _ in layers]
        self._streams: list[list[_Stream]] = [[] for _ in layers]
        self._transposed = [
            frozenset(shard.slot for shard in shards if shard.stored.transposed)
            for shards in layers
        ]
        """Of each layer, slots of matrices that lie as (features in, features out)."""
        self._experts: list[dict[int, list[_Stream]]] = [{} for _ in layers]
        """What streams of each expert, of those that do not stay as a whole."""
        self._window: ExpertWindow | None = None
        self._projections: list[list[_Stream]] = [[] for _ in layers]
        """Bundles that stay on the host while the CPU multiplies with them."""
        self._on_host: dict[Shard, Tensor] = {}
        for shards in layers:
            for shard in shards:
                store.placed_bytes["weights", shard.tier] += shard.num_bytes

    def load(self) -> None:
        """Read what is resident. Needs staging for one layer (or expert) more than stays."""
        for layer, shards in enumerate(self._shards):
            by_expert: dict[int | None, list[Shard]] = defaultdict(list)
            for shard in shards:
                by_expert[shard.tensor.expert].append(shard)
            for expert, own in by_expert.items():
                self._store.label = f"layer {layer}"
                self._load_shards(layer, expert, own)
        moving = [[self.moving(own) for own in of_layer.values()] for of_layer in self._experts]
        if any(moving):
            num_bytes = (
                expert_window_bytes([[each.device_bytes for each in own] for own in moving]),
                expert_window_bytes([[each.host_bytes for each in own] for own in moving]),
            )
            decoded = max(each.decoded_bytes for own in moving for each in own)
            self._window = ExpertWindow(self._store, num_bytes, decoded)

    def staging_bytes(self, layer: int, *, on_host: bool = False) -> tuple[int, int]:
        """Device and host bytes that fetching the layer takes.

        Decoded copies are not in it, which are made when it is computed with, one layer at a time;
        nor are experts, which have memory of their own. With `on_host`, the CPU multiplies with what
        it can.
        """
        moving = self.moving(self._streamed(layer, on_host))
        return moving.device_bytes, moving.host_bytes

    def fetch(self, layer: int, host: HostCompute | None = None, num_tokens: int = 1) -> LayerLease:
        """Start streaming a layer; given a CPU, without what that multiplies with.

        Experts start early if the first visit's num_tokens tokens will pick nearly all of them.
        """
        leases = [
            (bundle, kept, self._store.fetch(kept))
            for bundle, kept in self._streamed(layer, host is not None)
        ]
        on_host: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for bundle, _ in self._projections[layer] if host is not None else ():
            for shard in bundle.shards:
                on_host[shard.slot].append((shard.begin, self._on_host[shard]))
        lease = LayerLease(
            self,
            self._store,
            self._resident[layer],
            leases,
            self._dtype,
            self._transposed[layer],
            host,
            on_host,
        )
        if self._window is not None and self._experts[layer]:
            lease.stream_experts(self._experts[layer], self._window)
            experts = self.spec.layers[layer - 1].mlp
            if isinstance(experts, Experts) and will_pick_nearly_all(experts, num_tokens):
                lease.begin_experts()
        return lease

    def _streamed(self, layer: int, on_host: bool) -> list[_Stream]:
        return [*self._streams[layer], *([] if on_host else self._projections[layer])]

    def rows(self, slot: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, (T, F) on the device; `ids_T` is int64 in host memory."""
        layer = self.spec.head_layer if slot == "head.weight" else 0
        shards = [shard for shard in self._shards[layer] if shard.slot == slot]
        resident = dict(self._resident[layer].get(slot, []))
        if len(shards) == 1 and 0 in resident:
            return self._rows_of(shards[0], resident[0], ids_T)
        wanted_R, places_T = torch.unique(ids_T, return_inverse=True)
        pieces = []
        for shard in sorted(shards, key=lambda shard: shard.begin):
            mine_R = wanted_R[(wanted_R >= shard.begin) & (wanted_R < shard.end)] - shard.begin
            if len(mine_R):
                pieces.append(self._rows_of(shard, resident.get(shard.begin), mine_R))
        return torch.cat(pieces)[to_device(self._backend, places_T)]

    def _rows_of(self, shard: Shard, resident: _Weight | None, rows_R: Tensor) -> Tensor:
        if resident is not None:
            assert isinstance(resident, Tensor), "a table is never packed"
            return resident[to_device(self._backend, rows_R)]
        if shard in self._on_host:
            values_RF = self._on_host[shard][rows_R]
        else:
            (run,) = shard.runs
            raw_RB = self._store.read_rows(run, shard.row_bytes, rows_R.tolist())
            values_RF = raw_RB.view(_dtype_of(shard))
        return to_device(self._backend, values_RF.to(self._dtype))

    def moving(self, streams: Sequence[_Stream]) -> Moving:
        """How some bundles stream."""
        staging = [self._store.staging_bytes(kept) for _, kept in streams]
        return Moving(
            device_bytes=sum(for_device for for_device, _ in staging),
            host_bytes=sum(for_host for _, for_host in staging),
            decoded_bytes=sum(decoded_bytes(bundle.shards, self._dtype) for bundle, _ in streams),
            start=lambda: [self._store.fetch(kept) for _, kept in streams],
        )

    def _load_shards(self, layer: int, expert: int | None, shards: Sequence[Shard]) -> None:
        near = {Tier.DEVICE, Tier.HOST} if self._store.unified else {Tier.DEVICE}
        stays = [shard for shard in shards if shard.tier in near and not shard.stored.is_packed]
        if stays:
            self._make_resident(layer, stays)
        own: list[_Stream] = []
        packed = [shard for shard in shards if shard.tier in near and shard.stored.is_packed]
        packed = self._settle(layer, packed)
        if packed:
            bundle = Bundle(packed)
            own.append((bundle, self._keep_on_device(bundle)))
        for tier in (Tier.HOST, Tier.DISK):
            away = [shard for shard in shards if shard.tier is tier and tier not in near]
            streams = [shard for shard in away if shard.tensor.kind != "table"]
            tables = [shard for shard in away if shard.tensor.kind == "table"]
            projections = [
                shard for shard in streams if tier is Tier.HOST and self._is_projection(shard)
            ]
            streams = [shard for shard in streams if shard not in projections]
            keep = self._keep_on_host if tier is Tier.HOST else self._keep_in_files
            for shards_of, bundles in (
                (streams, own),
                (projections, self._projections[layer]),
            ):
                if shards_of:
                    bundle = Bundle(shards_of)
                    bundles.append((bundle, keep(bundle)))
            if tables and tier is Tier.HOST:
                self._keep_on_host(Bundle(tables))
        if expert is None:
            self._streams[layer] += own
        elif own:
            self._experts[layer][expert] = own

    def _is_projection(self, shard: Shard) -> bool:
        """Whether the CPU may multiply with the shard, as it lies."""
        return (
            self._cpu_projections
            and is_projection(shard.tensor)
            and not shard.stored.is_packed
            and _dtype_of(shard) == self._dtype
        )

    def _settle(self, layer: int, shards: Sequence[Shard]) -> list[Shard]:
        """Lay out for the backend's products what it never needs decoded; the others are returned."""
        if not shards or not isinstance(self._backend, MultipliesPacked):
            return list(shards)
        bundle, others = Bundle(shards), []
        on_disk = self._store.keep_file("weights", bundle.runs)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            for shard, parts in bundle.views(lease.bytes_B, on_disk):
                matrix = _Packed(shard, parts, []).matrix
                settled = None if matrix is None else self._backend.settle(matrix, self._dtype)
                if settled is None:
                    others.append(shard)
                else:
                    self._store.device.reserve(Pool.rounded(shard.num_bytes))
                    self._resident[layer][shard.slot].append((shard.first_row, settled))
            self._backend.sync()
        finally:
            lease.release()
        return others

    def _make_resident(self, layer: int, shards: Sequence[Shard]) -> None:
        bundle = Bundle(shards)
        on_disk = self._store.keep_file("weights", bundle.runs)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            for shard, parts in bundle.views(lease.bytes_B, on_disk):
                tensor = self._resident_tensor(shard, parts[0])
                self._resident[layer][shard.slot].append((shard.first_row, tensor))
            self._backend.sync()
        finally:
            lease.release()

    def _resident_tensor(self, shard: Shard, view: Tensor) -> Tensor:
        pool, dtype = self._store.device, _dtype_in_use(shard, self._dtype)
        buffer = pool.take(view.numel() * dtype.itemsize)
        plain = as_tensor(buffer.bytes_B, 0, shard.shape, dtype).copy_(view)
        # A tied head is a table too, and a packed weight can't be read by rows.
        is_table = self.spec.tied_head and shard.slot == "head.weight"
        is_matrix = shard.tensor.kind == "matrix" and not is_table
        if shard.stored.transposed:
            plain = plain.T
        if not is_matrix or not isinstance(self._backend, PacksWeights):
            return plain
        packed = self._backend.pack(plain)
        if packed is not plain:
            pool.give_back(buffer)
            pool.reserve(buffer.num_bytes)
        return packed

    def _keep_on_device(self, bundle: Bundle) -> Kept:
        """Read a packed bundle into device memory, where it stays as it lies on disk."""
        on_disk = self._store.keep_file("weights", bundle.runs)
        buffer = self._store.device.take(on_disk.num_bytes)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            buffer.bytes_B[: on_disk.num_bytes].copy_(lease.bytes_B)
            self._backend.sync()
        finally:
            lease.release()
        return Kept(
            kind="weights",
            num_bytes=on_disk.num_bytes,
            home=Tier.DEVICE,
            buffer=buffer,
            starts_bytes=on_disk.starts_bytes,
        )

    def _keep_in_files(self, bundle: Bundle) -> Kept:
        return self._store.keep_file("weights", bundle.runs)

    def _keep_on_host(self, bundle: Bundle) -> Kept:
        """Read a bundle from its files into host memory, where it stays, as it lies on disk."""
        store = self._store
        on_disk = store.keep_file("weights", bundle.runs)
        buffer = store.host.take(on_disk.num_bytes)
        store.read_file(on_disk, buffer.bytes_B[: on_disk.num_bytes]).join()
        kept = Kept(
            kind="weights",
            num_bytes=on_disk.num_bytes,
            home=Tier.HOST,
            buffer=buffer,
            starts_bytes=on_disk.starts_bytes,
        )
        self._on_host.update(
            (shard, parts[0])
            for shard, parts in bundle.views(buffer.bytes_B, kept)
            if not shard.stored.is_packed
        )
        return kept


def decoded_bytes(shards: Sequence[Shard], dtype: torch.dtype) -> int:
    """What copies take of the shards that are not computed with as they are in the file."""
    return sum(
        Pool.rounded(math.prod(shard.shape) * dtype.itemsize)
        for shard in shards
        if shard.stored.is_packed or _dtype_of(shard) != _dtype_in_use(shard, dtype)
    )


def _dtype_in_use(shard: Shard, dtype: torch.dtype) -> torch.dtype:
    """What a shard is computed with in, in a run that computes in `dtype`."""
    return _dtype_of(shard) if shard.stored.is_exact else dtype


def _dtype_of(shard: Shard) -> torch.dtype:
    """What the numbers of a shard that is not packed are stored as."""
    assert shard.dtype is not None, shard
    return torch_dtype(shard.dtype)


class LayerLease:
    """One layer's weights during one sweep: what `models.decoder.Weights` asks for."""

    def __init__(
        self,
        model: ModelWeights,
        store: Store,
        resident: Mapping[str, list[tuple[int, _Weight]]],
        leases: Sequence[tuple[Bundle, Kept, Lease]],
        dtype: torch.dtype,
        transposed: frozenset[str],
        host: HostCompute | None = None,
        on_host: Mapping[str, list[tuple[int, Tensor]]] | None = None,
    ) -> None:
        """`on_host` are parts of matrices, with their first rows, that `host` multiplies with.

        `transposed` are the slots of those whose rows are features in.
        """
        self._transposed = transposed
        self._host = host
        self._on_host = on_host or {}
        self._model = model
        self._store = store
        self._backend: Backend = store.backend
        self._resident = resident
        self._leases = leases
        self._dtype = dtype
        self._decoded: list[Buffer] = []
        self._tokens: Counter[str] = Counter()
        """Of each slot that is packed, what it was multiplied with so far."""
        self._parts: _Parts | None = None
        """Parts of each tensor on the device, each with its first row, in their order."""
        self._stream: ExpertStream | None = None
        self._expert_streams: Mapping[int, Sequence[_Stream]] = {}
        self.stays = False
        """Whether another visit of the sweep will come."""

    def wait(self) -> None:
        """Order what is computed from now on after the streams, and decode what they brought."""
        if self._parts is not None:
            return
        parts: _Parts = {slot: list(tensors) for slot, tensors in self._resident.items()}
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
            if f"{part}.weight" in self._transposed:
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
        is_packed = any(isinstance(weight, _Packed) for _, weight in parts)
        if is_packed:
            self._tokens[slot] += num_tokens
        taken: list[tuple[int, Tensor | PackedMatrix]] = []
        for number, (begin, weight) in enumerate(parts):
            if isinstance(weight, _Packed):
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
            streams = self._expert_streams.get(expert, ())
            came = [(*stream, lease) for stream, lease in zip(streams, leases, strict=True)]
            slots = {shard.slot for bundle, _, _ in came for shard in bundle.shards}
            decoded_bytes = self._model.moving(streams).decoded_bytes
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

    def stream_experts(
        self, streams: Mapping[int, Sequence[_Stream]], window: ExpertWindow
    ) -> None:
        """Some experts, or parts of them, come through the window."""
        self._expert_streams = streams
        self._stream = ExpertStream(
            window,
            {expert: self._model.moving(own) for expert, own in streams.items()},
        )

    def begin_experts(self) -> None:
        """Let them come before they are picked."""
        assert self._stream is not None, "no expert streams"
        self._stream.begin()

    def _arrive(
        self,
        parts: _Parts,
        came: Sequence[tuple[Bundle, Kept, Lease]],
        decoded: list[Buffer],
    ) -> None:
        """Add to `parts` what has come, decoded; order what is computed from now on after it."""
        for bundle, kept, lease in came:
            lease.ticket.wait()
            for shard, views in bundle.views(lease.bytes_B, kept):
                slot, weight = shard.slot, self._arrived(shard, views, decoded)
                own = [*parts.get(slot, ()), (shard.first_row, weight)]
                parts[slot] = sorted(own, key=lambda part: part[0])

    def _arrived(self, shard: Shard, views: Sequence[Tensor], decoded: list[Buffer]) -> _Weight:
        """What has come, in the dtype computed in unless it is packed."""
        if shard.stored.is_packed:
            return _Packed(shard, views, decoded)
        values = views[0]
        if values.dtype != _dtype_in_use(shard, self._dtype):
            values = self._decode(shard, views, decoded)
        return values.T if shard.stored.transposed else values

    def _decoded_values(self, packed: _Packed) -> Tensor:
        values = self._decode(packed.shard, packed.parts, packed.decoded)
        return values.T if packed.shard.stored.transposed else values

    def _whole(self, slot: str) -> Tensor:
        values = []
        for _, weight in self._all()[slot]:
            assert not isinstance(weight, PackedMatrix), f"{slot} is settled for products"
            values.append(self._decoded_values(weight) if isinstance(weight, _Packed) else weight)
        # Of a transposed matrix, parts follow each other along features in.
        along = 1 if slot in self._transposed else 0
        whole = values[0] if len(values) == 1 else torch.cat(values, along)
        self._all()[slot] = [(0, whole)]
        return whole

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table; those of a tied token table are the head's."""
        shared = part == "tokens" and self._model.spec.tied_head
        return self._model.rows("head.weight" if shared else f"{part}.weight", ids_T)

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

    def _all(self) -> _Parts:
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

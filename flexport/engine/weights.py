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
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexport.backend import Backend, PacksWeights
from flexport.engine.host_compute import HostCompute
from flexport.engine.transfer import to_device
from flexport.models.spec import ModelSpec, TensorSpec, is_projection, owned_tensors
from flexport.planner.footprint import layer_splits
from flexport.policy import Split, Tier
from flexport.records import FileTensor
from flexport.store.place import Dealer
from flexport.store.pool import Buffer, Pool
from flexport.store.store import FileRun, Kept, Lease, Store
from flexport.torch_ops import as_tensor, torch_dtype

__all__ = ["LayerLease", "ModelWeights", "Shard", "place_weights"]

MERGE_BYTES = 8 << 10
"""Ranges of a file closer than this are read as one. Reading them apart would take as much memory,
each end being rounded to an aligned place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Some rows of one tensor, at home on one tier."""

    tensor: TensorSpec
    file: FileTensor
    begin: int
    end: int
    tier: Tier

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of these rows."""
        return (self.end - self.begin, *self.tensor.shape[1:])

    @property
    def first_row(self) -> int:
        """The first of these rows, counted as the slot's."""
        return self.begin + (self.tensor.row or 0)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, as it lies in the file."""
        return self.file.num_bytes // self.tensor.shape[0]

    @property
    def run(self) -> FileRun:
        """Where its bytes lie."""
        return FileRun(
            path=self.file.path,
            offset_bytes=self.file.offset_bytes + self.begin * self.row_bytes,
            num_bytes=(self.end - self.begin) * self.row_bytes,
        )


def place_weights(
    spec: ModelSpec,
    files: Mapping[str, FileTensor],
    split: Split,
    *,
    projections_on_host: bool = False,
) -> list[list[Shard]]:
    """The shards of each layer of the schedule, by the weight split.

    With projections_on_host, what is on the host of a layer is first of all what the CPU can
    multiply with.
    """
    found_layers = [
        [
            (tensor, _part_of(next(files[name] for name in tensor.names if name in files), tensor))
            for tensor in tensors
        ]
        for tensors in (owned_tensors(spec, layer) for layer in range(spec.num_schedule_layers))
    ]
    sizes = [sum(file.num_bytes for _, file in found) for found in found_layers]
    dealers: dict[Split, Dealer] = {}
    layers = []
    for found, own in zip(found_layers, layer_splits(sizes, split), strict=True):
        dealer = dealers.setdefault(own, Dealer(own))
        # Vectors first: they are the last that should stream, being used by every visit.
        ordered = sorted(found, key=lambda pair: pair[0].kind not in ("norm", "bias"))
        if projections_on_host:
            ordered = _with_projections_after(ordered, own.device)
        parts = dealer.cut([(f.shape[0], f.num_bytes // f.shape[0]) for _, f in ordered])
        layers.append(
            [
                Shard(
                    tensor=ordered[part.index][0],
                    file=ordered[part.index][1],
                    begin=part.begin,
                    end=part.end,
                    tier=part.tier,
                )
                for part in parts
            ]
        )
    return layers


def _with_projections_after(
    ordered: Sequence[tuple[TensorSpec, FileTensor]], share: float
) -> list[tuple[TensorSpec, FileTensor]]:
    """The same, with query, key and value matrices right after the first `share` of the bytes."""
    others = [pair for pair in ordered if not is_projection(pair[0])]
    projections = [pair for pair in ordered if is_projection(pair[0])]
    before_bytes = share * sum(file.num_bytes for _, file in ordered)
    at = 0
    while at < len(others) and before_bytes > 0:
        before_bytes -= others[at][1].num_bytes
        at += 1
    return [*others[:at], *projections, *others[at:]]


def _part_of(file: FileTensor, tensor: TensorSpec) -> FileTensor:
    """The bytes of a tensor that may be a slice of the file's, in the tensor's own shape."""
    index, num_slices = tensor.slice_of or (0, 1)
    num_bytes = file.num_bytes // num_slices
    return replace(
        file,
        offset_bytes=file.offset_bytes + index * num_bytes,
        num_bytes=num_bytes,
        shape=tensor.shape,
    )


class _Bundle:
    """Shards of one layer that stream together, and where each lies in their bytes."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = sorted(shards, key=lambda s: (str(s.run.path), s.run.offset_bytes))
        runs: list[FileRun] = []
        self._places: list[tuple[int, int]] = []
        for shard in self.shards:
            run = shard.run
            end = run.offset_bytes + run.num_bytes
            if runs and runs[-1].path == run.path:
                gap_bytes = run.offset_bytes - (runs[-1].offset_bytes + runs[-1].num_bytes)
                if gap_bytes <= MERGE_BYTES:
                    start = runs[-1].offset_bytes
                    runs[-1] = FileRun(path=run.path, offset_bytes=start, num_bytes=end - start)
                    self._places.append((len(runs) - 1, run.offset_bytes - start))
                    continue
            runs.append(run)
            self._places.append((len(runs) - 1, 0))
        self.runs = tuple(runs)

    def views(self, bytes_B: Tensor, kept: Kept) -> list[tuple[Shard, Tensor]]:
        """Each shard's values in the bundle's bytes, in the dtype of the file."""
        return [
            (
                shard,
                as_tensor(
                    bytes_B,
                    kept.starts_bytes[run] + offset_bytes,
                    shard.shape,
                    torch_dtype(shard.file.dtype),
                ),
            )
            for shard, (run, offset_bytes) in zip(self.shards, self._places, strict=True)
        ]


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
        self._resident: list[dict[str, list[tuple[int, Tensor]]]] = [
            defaultdict(list) for _ in layers
        ]
        self._streams: list[list[tuple[_Bundle, Kept]]] = [[] for _ in layers]
        self.transposed = frozenset(
            shard.tensor.slot for shards in layers for shard in shards if shard.tensor.transposed
        )
        """Slots of matrices that lie as (features in, features out), in whatever layer."""
        self._projections: list[list[tuple[_Bundle, Kept]]] = [[] for _ in layers]
        """Bundles that stay on the host while the CPU multiplies with them."""
        self._on_host: dict[Shard, Tensor] = {}
        for shards in layers:
            for shard in shards:
                store.placed_bytes["weights", shard.tier] += shard.run.num_bytes

    def load(self) -> None:
        """Read what is resident. Needs staging for one layer more than stays."""
        for layer, shards in enumerate(self._shards):
            self._store.label = f"layer {layer}"
            self._load_layer(layer, shards)

    def staging_bytes(self, layer: int, *, on_host: bool = False) -> tuple[int, int]:
        """Device and host bytes that fetching the layer takes, decoded copies included.

        With `on_host`, the CPU multiplies with what it can.
        """
        device_bytes, host_bytes = 0, 0
        for bundle, kept in self._streamed(layer, on_host):
            for_device, for_host = self._store.staging_bytes(kept)
            device_bytes += for_device + decoded_bytes(bundle.shards, self._dtype)
            host_bytes += for_host
        return device_bytes, host_bytes

    def fetch(self, layer: int, host: HostCompute | None = None) -> LayerLease:
        """Start streaming a layer; given a CPU, without what that multiplies with."""
        leases = [
            (bundle, kept, self._store.fetch(kept))
            for bundle, kept in self._streamed(layer, host is not None)
        ]
        on_host: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
        for bundle, _ in self._projections[layer] if host is not None else ():
            for shard in bundle.shards:
                on_host[shard.tensor.slot].append((shard.begin, self._on_host[shard]))
        return LayerLease(
            self, self._store, self._resident[layer], leases, self._dtype, host, on_host
        )

    def _streamed(self, layer: int, on_host: bool) -> list[tuple[_Bundle, Kept]]:
        return [*self._streams[layer], *([] if on_host else self._projections[layer])]

    def rows(self, slot: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, (T, F) on the device; `ids_T` is int64 in host memory."""
        layer = self.spec.head_layer if slot == "head.weight" else 0
        shards = [shard for shard in self._shards[layer] if shard.tensor.slot == slot]
        resident = dict(self._resident[layer].get(slot, []))
        if len(shards) == 1 and 0 in resident:
            return resident[0][to_device(self._backend, ids_T)]
        wanted_R, places_T = torch.unique(ids_T, return_inverse=True)
        pieces = []
        for shard in sorted(shards, key=lambda shard: shard.begin):
            mine_R = wanted_R[(wanted_R >= shard.begin) & (wanted_R < shard.end)] - shard.begin
            if len(mine_R):
                pieces.append(self._rows_of(shard, resident.get(shard.begin), mine_R))
        return torch.cat(pieces)[to_device(self._backend, places_T)]

    def _rows_of(self, shard: Shard, resident_RF: Tensor | None, rows_R: Tensor) -> Tensor:
        if resident_RF is not None:
            return resident_RF[to_device(self._backend, rows_R)]
        if shard in self._on_host:
            values_RF = self._on_host[shard][rows_R]
        else:
            raw_RB = self._store.read_rows(shard.run, shard.row_bytes, rows_R.tolist())
            values_RF = raw_RB.view(torch_dtype(shard.file.dtype))
        return to_device(self._backend, values_RF.to(self._dtype))

    def _load_layer(self, layer: int, shards: Sequence[Shard]) -> None:
        near = {Tier.DEVICE, Tier.HOST} if self._store.unified else {Tier.DEVICE}
        stays = [shard for shard in shards if shard.tier in near]
        if stays:
            self._make_resident(layer, stays)
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
                (streams, self._streams[layer]),
                (projections, self._projections[layer]),
            ):
                if shards_of:
                    bundle = _Bundle(shards_of)
                    bundles.append((bundle, keep(bundle)))
            if tables and tier is Tier.HOST:
                self._keep_on_host(_Bundle(tables))

    def _is_projection(self, shard: Shard) -> bool:
        """Whether the CPU may multiply with the shard, as it lies."""
        return (
            self._cpu_projections
            and is_projection(shard.tensor)
            and torch_dtype(shard.file.dtype) == self._dtype
        )

    def _make_resident(self, layer: int, shards: Sequence[Shard]) -> None:
        bundle = _Bundle(shards)
        on_disk = self._store.keep_file("weights", bundle.runs)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            for shard, view in bundle.views(lease.bytes_B, on_disk):
                tensor = self._resident_tensor(shard, view)
                self._resident[layer][shard.tensor.slot].append((shard.first_row, tensor))
            self._backend.sync()
        finally:
            lease.release()

    def _resident_tensor(self, shard: Shard, view: Tensor) -> Tensor:
        pool = self._store.device
        buffer = pool.take(view.numel() * self._dtype.itemsize)
        plain = as_tensor(buffer.bytes_B, 0, shard.shape, self._dtype).copy_(view)
        # A tied head is a table too, and a packed weight can't be read by rows.
        is_table = self.spec.tied_head and shard.tensor.slot == "head.weight"
        is_matrix = shard.tensor.kind == "matrix" and not is_table
        if shard.tensor.transposed:
            plain = plain.T
        if not is_matrix or not isinstance(self._backend, PacksWeights):
            return plain
        packed = self._backend.pack(plain)
        if packed is not plain:
            pool.give_back(buffer)
            pool.reserve(buffer.num_bytes)
        return packed

    def _keep_in_files(self, bundle: _Bundle) -> Kept:
        return self._store.keep_file("weights", bundle.runs)

    def _keep_on_host(self, bundle: _Bundle) -> Kept:
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
        self._on_host.update(bundle.views(buffer.bytes_B, kept))
        return kept


def decoded_bytes(shards: Sequence[Shard], dtype: torch.dtype) -> int:
    """What copies of the shards in `dtype` take; nothing for those that have it in the file."""
    return sum(
        Pool.rounded(math.prod(shard.shape) * dtype.itemsize)
        for shard in shards
        if torch_dtype(shard.file.dtype) != dtype
    )


class LayerLease:
    """One layer's weights during one sweep: what `models.decoder.Weights` asks for."""

    def __init__(
        self,
        model: ModelWeights,
        store: Store,
        resident: Mapping[str, list[tuple[int, Tensor]]],
        leases: Sequence[tuple[_Bundle, Kept, Lease]],
        dtype: torch.dtype,
        host: HostCompute | None = None,
        on_host: Mapping[str, list[tuple[int, Tensor]]] | None = None,
    ) -> None:
        """`on_host` are parts of matrices, with their first rows, that `host` multiplies with."""
        self._host = host
        self._on_host = on_host or {}
        self._model = model
        self._store = store
        self._backend: Backend = store.backend
        self._resident = resident
        self._leases = leases
        self._dtype = dtype
        self._decoded: list[Buffer] = []
        self._parts: dict[str, list[tuple[int, Tensor]]] | None = None
        """Parts of each tensor on the device, each with its first row, in their order."""

    def wait(self) -> None:
        """Order what is computed from now on after the streams, and decode what they brought."""
        if self._parts is not None:
            return
        parts: dict[str, list[tuple[int, Tensor]]] = {
            slot: list(tensors) for slot, tensors in self._resident.items()
        }
        for bundle, kept, lease in self._leases:
            lease.ticket.wait()
            for shard, view in bundle.views(lease.bytes_B, kept):
                values = self._decode(view)
                if shard.tensor.transposed:
                    values = values.T
                parts.setdefault(shard.tensor.slot, []).append((shard.first_row, values))
        self._parts = {
            slot: sorted(tensors, key=lambda part: part[0]) for slot, tensors in parts.items()
        }

    join = wait

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        """x @ weight.T, plus the bias if there is one: (T, F)."""
        return self.linears(x_TD, (part,))[0]

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        """The same for several parts; x crosses to the CPU once, while the device computes."""
        far = [(part, *own) for part in parts for own in self._on_host.get(f"{part}.weight", ())]
        crossing = self._host.send([x_TD]) if self._host is not None and far else None
        pieces = {part: self._near_products(x_TD, part) for part in parts}
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

    def _near_products(self, x_TD: Tensor, part: str) -> list[tuple[int, Tensor]]:
        """What the device computes of a product, each with its first feature."""
        bias_F, products = self._bias(part), []
        shards = self._all().get(f"{part}.weight", ())
        if f"{part}.weight" in self._model.transposed:
            return [(0, self._sum_of_products(x_TD, shards, bias_F))]
        for begin, weight_RD in shards:
            bias_R = None if bias_F is None else bias_F[begin : begin + weight_RD.shape[0]]
            products.append((begin, self._backend.matmul(x_TD, weight_RD, bias_R)))
        return products

    def _sum_of_products(
        self, x_TD: Tensor, shards: Sequence[tuple[int, Tensor]], bias_F: Tensor | None
    ) -> Tensor:
        """The product with a matrix that is cut by features in."""
        total_TF: Tensor | None = None
        for begin, weight_FR in shards:
            x_TR = x_TD[:, begin : begin + weight_FR.shape[1]]
            product_TF = self._backend.matmul(x_TR, weight_FR, bias_F)
            total_TF, bias_F = product_TF if total_TF is None else total_TF + product_TF, None
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
        """The experts of `picked`, each when its parts can be used."""
        yield from picked

    def _whole(self, slot: str) -> Tensor:
        parts = self._all()[slot]
        if len(parts) > 1:
            parts[:] = [(0, torch.cat([part for _, part in parts]))]
        return parts[0][1]

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table; those of a tied token table are the head's."""
        shared = part == "tokens" and self._model.spec.tied_head
        return self._model.rows("head.weight" if shared else f"{part}.weight", ids_T)

    def release(self) -> None:
        """The sweep has left this layer."""
        self._parts = None
        for buffer in self._decoded:
            self._store.device.give_back(buffer)
        self._decoded = []
        for _, _, lease in self._leases:
            lease.release()
        self._leases = ()

    def _all(self) -> dict[str, list[tuple[int, Tensor]]]:
        assert self._parts is not None, "the weights were not waited for"
        return self._parts

    def _decode(self, view: Tensor) -> Tensor:
        if view.dtype == self._dtype:
            return view
        buffer = self._store.device.take(view.numel() * self._dtype.itemsize)
        self._decoded.append(buffer)
        return as_tensor(buffer.bytes_B, 0, view.shape, self._dtype).copy_(view)


def _side_by_side(pieces: list[tuple[int, Tensor]]) -> Tensor:
    """Parts of a product, each with its first feature, as one tensor."""
    if len(pieces) == 1:
        return pieces[0][1]
    return torch.cat([piece for _, piece in sorted(pieces, key=lambda part: part[0])], dim=-1)

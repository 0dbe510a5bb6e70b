"""A model's weights over the tiers: loaded once or streamed every sweep, decoded once a sweep.

Each layer is cut by the weight split into resident and streamed parts. Resident parts are read
and decoded once, when the run opens (and packed for the backend's kernel where it can do that);
streamed ones come as at most two bundles a layer and sweep, one from the host and one from
disk: the byte ranges of the checkpoint's own files, read in place. Tables that are only read by
rows (token and position embeddings) never stream: the rows in need are fetched. Where a CPU stands
beside the device and the policy has it project, what is at home on the host of the query, key and
value matrices streams in sweeps with prompts only; in others the CPU multiplies with it there.

What a sweep does with a layer is `engine.layer_lease`.

Dimension key: T tokens, F features of a table's row, R rows of a part, B bytes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from flexport.backend import MultipliesPacked, PacksWeights
from flexport.engine.experts import ExpertWindow, will_pick_nearly_all
from flexport.engine.homes import LayerHome, Packed, Stream, moving
from flexport.engine.host_compute import HostCompute
from flexport.engine.layer_lease import LayerLease
from flexport.engine.shards import Bundle, Shard, dtype_in_use, stored_dtype
from flexport.engine.transfer import to_device
from flexport.models.spec import Experts, ModelSpec
from flexport.models.tensors import is_projection
from flexport.planner.footprint import expert_window_bytes
from flexport.policy import Tier
from flexport.store.pool import Pool
from flexport.store.store import Kept, Store
from flexport.torch_ops import as_tensor

__all__ = ["ModelWeights"]


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
        self._homes = [LayerHome(shards) for shards in layers]
        self._window: ExpertWindow | None = None
        for shards in layers:
            for shard in shards:
                store.placed_bytes["weights", shard.tier] += shard.num_bytes

    def load(self) -> None:
        """Read what is resident. Needs staging for one layer (or expert) more than stays."""
        for layer, home in enumerate(self._homes):
            by_expert: dict[int | None, list[Shard]] = defaultdict(list)
            for shard in home.shards:
                by_expert[shard.tensor.expert].append(shard)
            for expert, own in by_expert.items():
                self._store.label = f"layer {layer}"
                self._load_shards(home, expert, own)
        movings = [
            [moving(self._store, own, self._dtype) for own in home.experts.values()]
            for home in self._homes
        ]
        if any(movings):
            num_bytes = (
                expert_window_bytes([[each.device_bytes for each in own] for own in movings]),
                expert_window_bytes([[each.host_bytes for each in own] for own in movings]),
            )
            decoded = max(each.decoded_bytes for own in movings for each in own)
            self._window = ExpertWindow(self._store, num_bytes, decoded)

    def staging_bytes(self, layer: int, *, on_host: bool = False) -> tuple[int, int]:
        """Device and host bytes that fetching the layer takes.

        Decoded copies are not in it, which are made when it is computed with, one layer at a time;
        nor are experts, which have memory of their own. With `on_host`, the CPU multiplies with what
        it can.
        """
        streams = self._homes[layer].streamed(on_host=on_host)
        own = moving(self._store, streams, self._dtype)
        return own.device_bytes, own.host_bytes

    def fetch(self, layer: int, host: HostCompute | None = None, num_tokens: int = 1) -> LayerLease:
        """Start streaming a layer; given a CPU, without what that multiplies with.

        Experts start early if the first visit's num_tokens tokens will pick nearly all of them.
        """
        home = self._homes[layer]
        lease = LayerLease(
            home, self._store, self._dtype, self.rows, host=host, window=self._window
        )
        if home.experts:
            experts = self.spec.layers[layer - 1].mlp
            if isinstance(experts, Experts) and will_pick_nearly_all(experts, num_tokens):
                lease.begin_experts()
        return lease

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, (T, F) on the device; `ids_T` is int64 in host memory.

        Those of a tied token table are the head's.
        """
        is_head = part == "tokens" and self.spec.tied_head
        home = self._homes[self.spec.head_layer if is_head else 0]
        slot = "head.weight" if is_head else f"{part}.weight"
        shards = [shard for shard in home.shards if shard.slot == slot]
        if len(shards) == 1 and home.resident.get(slot):
            return self._rows_of(home, shards[0], ids_T)
        wanted_R, places_T = torch.unique(ids_T, return_inverse=True)
        pieces = []
        for shard in sorted(shards, key=lambda shard: shard.begin):
            mine_R = wanted_R[(wanted_R >= shard.begin) & (wanted_R < shard.end)] - shard.begin
            if len(mine_R):
                pieces.append(self._rows_of(home, shard, mine_R))
        return torch.cat(pieces)[to_device(self._backend, places_T)]

    def _rows_of(self, home: LayerHome, shard: Shard, rows_R: Tensor) -> Tensor:
        resident = dict(home.resident.get(shard.slot, ())).get(shard.begin)
        if resident is not None:
            assert isinstance(resident, Tensor), "a table is never packed"
            return resident[to_device(self._backend, rows_R)]
        if shard in home.on_host:
            values_RF = home.on_host[shard][rows_R]
        else:
            (run,) = shard.runs
            raw_RB = self._store.read_rows(run, shard.row_bytes, rows_R.tolist())
            values_RF = raw_RB.view(stored_dtype(shard))
        return to_device(self._backend, values_RF.to(self._dtype))

    def _load_shards(self, home: LayerHome, expert: int | None, shards: Sequence[Shard]) -> None:
        near = {Tier.DEVICE, Tier.HOST} if self._store.unified else {Tier.DEVICE}
        stays = [shard for shard in shards if shard.tier in near and not shard.stored.is_packed]
        if stays:
            self._make_resident(home, stays)
        own: list[Stream] = []
        packed = [shard for shard in shards if shard.tier in near and shard.stored.is_packed]
        packed = self._settle(home, packed)
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
            for shards_of, bundles in ((streams, own), (projections, home.projections)):
                if shards_of:
                    bundle = Bundle(shards_of)
                    on_host = tier is Tier.HOST
                    kept = self._keep_on_host(home, bundle) if on_host else self._in_files(bundle)
                    bundles.append((bundle, kept))
            if tables and tier is Tier.HOST:
                self._keep_on_host(home, Bundle(tables))
        if expert is None:
            home.streams.extend(own)
        elif own:
            home.experts[expert] = own

    def _is_projection(self, shard: Shard) -> bool:
        """Whether the CPU may multiply with the shard, as it lies."""
        return (
            self._cpu_projections
            and is_projection(shard.tensor)
            and not shard.stored.is_packed
            and stored_dtype(shard) == self._dtype
        )

    def _settle(self, home: LayerHome, shards: Sequence[Shard]) -> list[Shard]:
        """Lay out for the backend's products what it never needs decoded; the others are returned."""
        if not shards or not isinstance(self._backend, MultipliesPacked):
            return list(shards)
        bundle, others = Bundle(shards), []
        on_disk = self._in_files(bundle)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            for shard, parts in bundle.views(lease.bytes_B, on_disk):
                matrix = Packed(shard, parts, []).matrix
                settled = None if matrix is None else self._backend.settle(matrix, self._dtype)
                if settled is None:
                    others.append(shard)
                else:
                    self._store.device.reserve(Pool.rounded(shard.num_bytes))
                    home.resident[shard.slot].append((shard.first_row, settled))
            self._backend.sync()
        finally:
            lease.release()
        return others

    def _make_resident(self, home: LayerHome, shards: Sequence[Shard]) -> None:
        bundle = Bundle(shards)
        on_disk = self._in_files(bundle)
        lease = self._store.fetch(on_disk)
        try:
            lease.ticket.wait()
            for shard, parts in bundle.views(lease.bytes_B, on_disk):
                tensor = self._resident_tensor(shard, parts[0])
                home.resident[shard.slot].append((shard.first_row, tensor))
            self._backend.sync()
        finally:
            lease.release()

    def _resident_tensor(self, shard: Shard, view: Tensor) -> Tensor:
        pool, dtype = self._store.device, dtype_in_use(shard, self._dtype)
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
        on_disk = self._in_files(bundle)
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

    def _in_files(self, bundle: Bundle) -> Kept:
        return self._store.keep_file("weights", bundle.runs)

    def _keep_on_host(self, home: LayerHome, bundle: Bundle) -> Kept:
        """Read a bundle from its files into host memory, where it stays, as it lies on disk."""
        store = self._store
        on_disk = self._in_files(bundle)
        buffer = store.host.take(on_disk.num_bytes)
        store.read_file(on_disk, buffer.bytes_B[: on_disk.num_bytes]).join()
        kept = Kept(
            kind="weights",
            num_bytes=on_disk.num_bytes,
            home=Tier.HOST,
            buffer=buffer,
            starts_bytes=on_disk.starts_bytes,
        )
        home.on_host.update(
            (shard, parts[0])
            for shard, parts in bundle.views(buffer.bytes_B, kept)
            if not shard.stored.is_packed
        )
        return kept

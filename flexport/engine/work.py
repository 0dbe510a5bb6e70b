"""What the schedule's loop drives: one job's batches on one store and one backend.

Dimension key: T tokens of a visit, D hidden features, W tokens whose logits are wanted, V
vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport.engine.cache import HeldBands
from flexport.engine.clock import Clock
from flexport.engine.hidden import HiddenStates
from flexport.engine.rows import Batch, Row
from flexport.engine.transfer import to_device
from flexport.engine.weights import LayerLease, ModelWeights
from flexport.models.decoder import decoder_layer, embed, head
from flexport.planner.footprint import HEAD_TOKENS, Footprint
from flexport.policy import Split
from flexport.schedule.order import Visit
from flexport.store.store import Store

__all__ = ["JobWork", "Purpose"]


class Purpose(Protocol):
    """What a job wants of its logits."""

    def take(self, rows: Sequence[tuple[Row, int]], logits_WV: Tensor) -> None:
        """Use the logits of (row, number of tokens); marks rows that have ended."""


class _Ready:
    """The ticket of a visit: its weights, its pages and its hidden states."""

    def __init__(self, tickets: Sequence[Ticket], clock: Clock) -> None:
        self._tickets = tickets
        self._clock = clock

    def wait(self) -> None:
        with self._clock.waiting():
            for ticket in self._tickets:
                ticket.wait()

    def join(self) -> None:
        for ticket in self._tickets:
            ticket.join()


class JobWork:
    """Fetches, computes and writes back visits; knows which batch is how far."""

    def __init__(
        self,
        weights: ModelWeights,
        store: Store,
        activations: Split,
        purpose: Purpose,
        clock: Clock,
        needs: Footprint,
    ) -> None:
        """What is fetched ahead leaves free what `needs` says the rest will take."""
        self.batches: dict[int, Batch] = {}
        self.ended: deque[Batch] = deque()
        """Batches whose last row has ended; whoever admits batches takes them from here."""
        self._spec = weights.spec
        self._weights = weights
        self._store = store
        self._hidden = HiddenStates(store, activations)
        self._purpose = purpose
        self._clock = clock
        self._behind_bytes = needs.headroom_bytes
        self._states_bytes = needs.states_bytes
        self._layers: dict[tuple[int, int], LayerLease] = {}
        self._held: dict[Visit, HeldBands] = {}
        self._ahead: deque[Visit] = deque()

    # ---- what the schedule's loop asks

    def has_room_for(self, visit: Visit) -> bool:
        """Whether the visit can be fetched beside what was fetched ahead, and its pages exist."""
        if any(_same_pages(visit, other) for other in self._ahead):
            return False
        device_bytes, host_bytes = (
            self._weights.staging_bytes(visit.layer) if visit.first else (0, 0)
        )
        if self._attends(visit):
            batch = self.batches[visit.piece.batch]
            pages = batch.cache.staging_bytes(visit.layer - 1, visit.piece)
            device_bytes, host_bytes = device_bytes + pages[0], host_bytes + pages[1]
        if device_bytes + host_bytes == 0:
            return True
        room = self._headroom()
        return (
            device_bytes + room[0] <= self._store.device.free_bytes
            and host_bytes + room[1] <= self._store.host.free_bytes
        )

    def fetch(self, visit: Visit) -> None:
        """Start what streams to the visit: its layer's weights if it is the first, its pages."""
        if visit.first:
            self._layers[visit.sweep, visit.layer] = self._weights.fetch(visit.layer)
        if self._attends(visit):
            batch = self.batches[visit.piece.batch]
            self._held[visit] = batch.cache.fetch(visit.layer - 1, visit.piece)
        self._ahead.append(visit)

    def ready(self, visit: Visit) -> Ticket:
        """The visit's copies. Raises what has failed in any lane by now."""
        self._store.check()
        assert self._ahead[0] == visit, (self._ahead[0], visit)
        tickets: list[Ticket] = [self._layers[visit.sweep, visit.layer]]
        if visit in self._held:
            batch = self.batches[visit.piece.batch]
            tickets += batch.cache.tickets(self._held[visit])
        return _Ready(tickets, self._clock)

    def compute(self, visit: Visit) -> None:
        """One piece through one layer, unless its batch has ended since it was planned."""
        self._ahead.popleft()
        if self._ahead:
            self._hidden.prefetch(self._ahead[0].piece)
        batch = self.batches.get(visit.piece.batch)
        if batch is None or batch.plan.ended:
            return
        layer = self._layers[visit.sweep, visit.layer]
        with self._clock.computing(), torch.inference_mode():
            if visit.layer == 0:
                self._embed(batch, visit, layer)
            elif visit.layer == self._spec.head_layer:
                self._head(batch, visit, layer)
            else:
                self._decoder_layer(batch, visit, layer)

    def write_back(self, visit: Visit) -> None:
        """Send pages home, and let go of the layer after its last visit of the sweep."""
        held = self._held.pop(visit, None)
        batch = self.batches.get(visit.piece.batch)
        if held is not None and batch is not None:
            if batch.plan.ended:
                batch.cache.release(held)
            else:
                batch.cache.write_back(held, batch.live(visit.piece))
        if visit.last:
            self._layers.pop((visit.sweep, visit.layer)).release()
        if batch is not None and batch.plan.ended and not self._is_awaited(batch):
            self._retire(batch)
        self._clock.lap(decode=visit.piece.band is None)

    def abandon(self) -> None:
        """Give everything back in the middle of a job, which is not gone on with."""
        for held in self._held.values():
            for of_band in held:
                for lease in of_band.leases:
                    lease.release()
        for layer in self._layers.values():
            layer.release()
        self._hidden.close()
        for batch in self.batches.values():
            batch.cache.drop()
        self._held.clear()
        self._layers.clear()
        self.batches.clear()

    # ---- the three kinds of layers

    def _embed(self, batch: Batch, visit: Visit, layer: LayerLease) -> None:
        ids, positions = batch.tokens(visit.piece)
        x_TD = embed(self._spec, layer, torch.tensor(ids), torch.tensor(positions))
        self._hidden.put(visit.piece, x_TD)

    def _decoder_layer(self, batch: Batch, visit: Visit, layer: LayerLease) -> None:
        piece = visit.piece
        x_TD = self._hidden.take(piece)
        attend = batch.cache.attend(piece, batch.live(piece), self._held[visit], batch.keeps(piece))
        self._hidden.put(piece, decoder_layer(self._spec, layer, x_TD, attend))

    def _head(self, batch: Batch, visit: Visit, layer: LayerLease) -> None:
        x_TD = self._hidden.take(visit.piece)
        rows, places = batch.wanted(visit.piece)
        if not places:
            return
        if len(places) < x_TD.shape[0]:
            x_TD = x_TD[to_device(self._store.backend, torch.tensor(places))]
        for group, begin, end in _groups(rows, HEAD_TOKENS):
            self._purpose.take(group, head(self._spec, layer, x_TD[begin:end]))
        if all(row.ended for row in batch.rows):
            batch.plan.ended = True

    # ---- inside

    def _attends(self, visit: Visit) -> bool:
        batch = self.batches.get(visit.piece.batch)
        is_decoder_layer = 0 < visit.layer < self._spec.head_layer
        return is_decoder_layer and batch is not None and not batch.plan.ended

    def _headroom(self) -> tuple[int, int]:
        """What has to stay free: room for what computing leaves, and for states to come."""
        used = self._hidden.used_bytes
        behind, states = self._behind_bytes, self._states_bytes
        return (
            behind[0] + max(0, states[0] - used[0]),
            behind[1] + max(0, states[1] - used[1]),
        )

    def _is_awaited(self, batch: Batch) -> bool:
        return any(visit.piece.batch == batch.index for visit in self._ahead)

    def _retire(self, batch: Batch) -> None:
        batch.cache.drop()
        del self.batches[batch.index]
        self.ended.append(batch)


def _same_pages(visit: Visit, other: Visit) -> bool:
    """Whether the visit needs pages that the other one, which comes before, writes to."""
    if visit.layer != other.layer or visit.piece.batch != other.piece.batch:
        return False
    bands = {visit.piece.band, other.piece.band}
    return None in bands or len(bands) == 1


def _groups(
    rows: Sequence[tuple[Row, int]], max_tokens: int
) -> list[tuple[list[tuple[Row, int]], int, int]]:
    """Cut (row, number of tokens) into groups of at most max_tokens tokens, with their range.

    A row with more tokens than that comes in several groups.
    """
    groups: list[tuple[list[tuple[Row, int]], int, int]] = []
    group: list[tuple[Row, int]] = []
    begin = at = 0
    for row, count in rows:
        while count:
            taken = min(count, max_tokens - (at - begin))
            group.append((row, taken))
            at, count = at + taken, count - taken
            if at - begin == max_tokens:
                groups.append((group, begin, at))
                group, begin = [], at
    if group:
        groups.append((group, begin, at))
    return groups

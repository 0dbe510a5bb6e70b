"""What the schedule's loop drives: one job's batches on one store and one backend.

Dimension key: T tokens of a visit, D hidden features, W tokens whose logits are wanted, V
vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport.engine.attend import PieceAttention, attend_to, common_to_rows
from flexport.engine.cache import HeldBands
from flexport.engine.clock import Clock
from flexport.engine.hidden import HiddenStates
from flexport.engine.host_compute import HostCompute
from flexport.engine.layer_lease import LayerLease
from flexport.engine.rows import Batch, Row
from flexport.engine.sparse_step import Sparsity
from flexport.engine.transfer import to_device
from flexport.engine.turns import VisitTurns
from flexport.engine.weights import ModelWeights
from flexport.models.decoder import decoder_layer, embed, head
from flexport.models.rope import Rope
from flexport.planner.footprint import HEAD_TOKENS, STATES_AHEAD, Footprint
from flexport.policy import Split
from flexport.process import trim_heap
from flexport.schedule.executor import LAG
from flexport.schedule.order import Piece, Visit
from flexport.store.store import Store

__all__ = ["JobWork", "Purpose"]

TRIM_EVERY_S = 5.0
"""Seconds between two trims of the heap, which cost 0.1 s each for memory to be faulted in again."""

Pieces = tuple[Piece, ...]
_Part = tuple[Batch, Piece]


class Purpose(Protocol):
    """What a job wants of its logits."""

    def take(self, rows: Sequence[tuple[Row, int]], logits_WV: Tensor) -> None:
        """Use the logits of (row, number of tokens); marks rows that have ended."""


class _Ready:
    """The ticket of a visit: its weights, its pages and its hidden states."""

    def __init__(self, tickets: Sequence[Ticket], clock: Clock, label: str) -> None:
        self._tickets = tickets
        self._clock = clock
        self._label = label

    def wait(self) -> None:
        with self._clock.waiting(self._label):
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
        host: HostCompute | None = None,
        sparsity: Sparsity | None = None,
    ) -> None:
        """What is fetched ahead leaves free what `needs` says the rest will take.

        `host` is the CPU beside the device, where the policy asks for one. With `sparsity`, decode
        steps add up few values.
        """
        self.batches: dict[int, Batch] = {}
        """Those whose last row has not ended, or for which something is still fetched ahead."""
        self._spec = weights.spec
        self._weights = weights
        self._store = store
        self._host = host
        self._sparsity = sparsity
        self._hidden = HiddenStates(store, activations)
        self._turns: dict[Pieces, VisitTurns] = {}
        """Of groups of pieces that are on their way through the layers."""
        attentions = [layer.attention for layer in self._spec.layers]
        self._turn = any(attention.rope is not None for attention in attentions)
        self._attentions = [common_to_rows(attention) for attention in attentions]
        self._purpose = purpose
        self._clock = clock
        self._behind_bytes = needs.headroom_bytes
        self._states_bytes = needs.states_bytes
        self._claim_bytes = needs.claim_bytes
        self.more_to_come = True
        """Whether batches may come that there is no cache for yet."""
        self._layers: dict[tuple[int, int], LayerLease] = {}
        self._held: dict[tuple[int, Piece], HeldBands] = {}
        """The pages of each piece, by layer."""
        self._ahead: deque[Visit] = deque()
        self._recent: deque[Visit] = deque(maxlen=LAG)
        self._issued: deque[Ticket] = deque()
        """Of visits that the device may not have computed yet."""
        self._trimmed_s = 0.0

    # ---- what the schedule's loop asks

    def has_room_for(self, visit: Visit) -> bool:
        """Whether the visit can be fetched beside what was fetched ahead, and its pages exist."""
        if any(visit.shares_pages_with(other) for other in (*self._ahead, *self._recent)):
            return False
        device_bytes, host_bytes = (
            self._weights.staging_bytes(visit.layer, on_host=self._projecting(visit) is not None)
            if visit.first
            else (0, 0)
        )
        for batch, piece in self._attending(visit):
            pages = batch.cache.staging_bytes(visit.layer - 1, piece)
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
        self._store.label = f"layer {visit.layer}"
        if visit.first:
            num_tokens = sum(piece.num_tokens for piece in visit.pieces)
            self._layers[visit.sweep, visit.layer] = self._weights.fetch(
                visit.layer, self._projecting(visit), num_tokens
            )
        for batch, piece in self._attending(visit):
            self._store.label = f"layer {visit.layer}, batch {batch.index}"
            self._held[visit.layer, piece] = batch.cache.fetch(visit.layer - 1, piece)
        self._ahead.append(visit)

    def ready(self, visit: Visit) -> Ticket:
        """The visit's copies. Raises what has failed in any lane by now."""
        self._store.check()
        assert self._ahead[0] == visit, (self._ahead[0], visit)
        tickets: list[Ticket] = [self._layers[visit.sweep, visit.layer]]
        for piece in visit.pieces:
            if (visit.layer, piece) in self._held:
                batch = self.batches[piece.batch]
                tickets += batch.cache.tickets(self._held[visit.layer, piece])
        return _Ready(tickets, self._clock, _told(visit))

    def compute(self, visit: Visit) -> None:
        """A group of pieces through one layer; those whose batch has ended meanwhile are left out."""
        self._recent.append(self._ahead.popleft())
        told = _told(visit)
        self._store.label = told
        while len(self._issued) > LAG:
            with self._clock.waiting("the device"):
                self._issued.popleft().join()
        for coming in islice(self._ahead, STATES_AHEAD):
            self._hidden.prefetch(coming.pieces)
        parts = self._parts(visit)
        if not parts:
            return
        layer = self._layers[visit.sweep, visit.layer]
        with self._clock.computing(told), torch.inference_mode():
            if visit.layer == 0:
                self._embed(visit.pieces, parts, layer)
            elif visit.layer == self._spec.head_layer:
                self._head(visit.pieces, parts, layer)
            else:
                self._decoder_layer(visit, parts, layer)

    def write_back(self, visit: Visit) -> None:
        """Send pages home, and let go of the layer after its last visit of the sweep."""
        for piece in visit.pieces:
            held = self._held.pop((visit.layer, piece), None)
            if held is None:
                continue
            batch = self.batches[piece.batch]
            self._store.label = f"layer {visit.layer}, batch {batch.index}"
            if batch.plan.ended:
                batch.cache.release(held)
            else:
                batch.cache.write_back(held, piece, batch.live(piece))
        if visit.last:
            self._layers.pop((visit.sweep, visit.layer)).release()
            if time.perf_counter() - self._trimmed_s > TRIM_EVERY_S:
                trim_heap()
                self._trimmed_s = time.perf_counter()
        for index in {piece.batch for piece in visit.pieces} & set(self.batches):
            batch = self.batches[index]
            if batch.plan.ended and not self._is_awaited(batch):
                self._retire(batch)
        num_tokens = sum(piece.num_tokens for piece in visit.pieces)
        num_decoded = sum(piece.num_tokens for piece in visit.pieces if piece.rows is None)
        self._clock.lap(decode_share=num_decoded / num_tokens)

    def abandon(self) -> None:
        """Give everything back in the middle of a job, which is not gone on with."""
        for held in self._held.values():
            for of_band in held:
                for lease in of_band.leases.values():
                    lease.release()
        for layer in self._layers.values():
            layer.release()
        self._hidden.close()
        if self._host is not None:
            self._host.close()
        for batch in self.batches.values():
            batch.cache.drop()
        self._held.clear()
        self._layers.clear()
        self.batches.clear()

    # ---- the three kinds of layers

    def _embed(self, key: Pieces, parts: Sequence[_Part], layer: LayerLease) -> None:
        tokens = [token for batch, piece in parts for token in batch.tokens(piece)]
        ids, positions, lengths, limits = (list(values) for values in zip(*tokens, strict=True))
        x_TD = embed(self._spec, layer, torch.tensor(ids), torch.tensor(positions))
        if self._turn:
            backend = self._store.backend
            self._turns[key] = VisitTurns(backend, x_TD.dtype, positions, lengths, limits)
        self._hidden.put(key, x_TD)

    def _decoder_layer(self, visit: Visit, parts: Sequence[_Part], layer: LayerLease) -> None:
        x_TD = self._hidden.take(visit.pieces)
        pieces = [
            PieceAttention(
                self._store.backend,
                self._host,
                batch.cache,
                piece,
                batch.live(piece),
                self._held[visit.layer, piece],
                attention=self._attentions[visit.layer - 1],
                num_tokens=batch.num_tokens(piece),
                keep=batch.keeps(piece),
                sparsity=self._sparsity,
            )
            for batch, piece in parts
        ]
        own = self._spec.layers[visit.layer - 1]
        layer.stays = not visit.last
        turns = self._turns.get(visit.pieces, _no_turns)
        x_TD = decoder_layer(self._spec, own, layer, x_TD, attend_to(pieces), turns)
        self._mark(x_TD)
        self._hidden.put(visit.pieces, x_TD)

    def _head(self, key: Pieces, parts: Sequence[_Part], layer: LayerLease) -> None:
        x_TD = self._hidden.take(key)
        self._turns.pop(key, None)
        rows: list[tuple[Row, int]] = []
        places: list[int] = []
        at = 0
        for batch, piece in parts:
            wanted, of_piece = batch.wanted(piece)
            rows.extend(wanted)
            places.extend(at + place for place in of_piece)
            at += batch.num_tokens(piece)
        if not places:
            return
        if len(places) < x_TD.shape[0]:
            x_TD = x_TD[to_device(self._store.backend, torch.tensor(places))]
        for group, begin, end in _groups(rows, HEAD_TOKENS):
            self._purpose.take(group, head(self._spec, layer, x_TD[begin:end]))
        for batch, _ in parts:
            if all(row.ended for row in batch.rows):
                batch.plan.ended = True

    # ---- inside

    def _parts(self, visit: Visit) -> list[_Part]:
        """The visit's pieces whose batches are still going."""
        return [
            (self.batches[piece.batch], piece)
            for piece in visit.pieces
            if piece.batch in self.batches and not self.batches[piece.batch].plan.ended
        ]

    def _attending(self, visit: Visit) -> list[_Part]:
        """The same, for a layer that has a cache."""
        return self._parts(visit) if 0 < visit.layer < self._spec.head_layer else []

    def _mark(self, x_TD: Tensor) -> None:
        """Let it be known when the device has computed x_TD; one number of it comes down."""
        if not self._store.unified:  # else no link waits for the device
            backend, last = self._store.backend, x_TD[:1, :1].clone()
            place = backend.allocate(last.shape, last.dtype, "host")
            self._issued.append(backend.copy_async(last, place))

    def _projecting(self, visit: Visit) -> HostCompute | None:
        """The CPU, if it multiplies with what is at home there in the visit's sweep."""
        return self._host if visit.steps_only else None

    def _headroom(self) -> tuple[int, int]:
        """What has to stay free: for what computing leaves, for states and for batches to come."""
        used = self._hidden.used_bytes
        behind, states = self._behind_bytes, self._states_bytes
        # What is left for decoded weights is in use already where some are.
        decoded_bytes = sum(layer.decoded_bytes for layer in self._layers.values())
        device_bytes = max(0, behind[0] - decoded_bytes) + max(0, states[0] - used[0])
        host_bytes = behind[1] + max(0, states[1] - used[1])
        if self.more_to_come:
            claims = [batch.cache.claim_bytes for batch in self.batches.values()]
            device_bytes += max(0, self._claim_bytes[0] - sum(claim[0] for claim in claims))
            host_bytes += max(0, self._claim_bytes[1] - sum(claim[1] for claim in claims))
        return device_bytes, host_bytes

    def _is_awaited(self, batch: Batch) -> bool:
        return any(piece.batch == batch.index for visit in self._ahead for piece in visit.pieces)

    def _retire(self, batch: Batch) -> None:
        batch.cache.drop()
        del self.batches[batch.index]


def _no_turns(rope: Rope) -> tuple[Tensor, Tensor]:
    raise AssertionError(f"the angles of {rope} were not kept")


def _told(visit: Visit) -> str:
    """The visit for people who look at a trace."""
    batches = sorted({piece.batch for piece in visit.pieces})
    told = f"batch {batches[0]}" if len(batches) == 1 else f"batches {batches[0]} to {batches[-1]}"
    return f"layer {visit.layer}, {told}"


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

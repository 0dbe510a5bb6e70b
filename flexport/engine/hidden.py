"""Hidden states between layers, at home wherever the activation split puts their tokens.

A group's states leave one layer and are needed again at the next, a whole row of visits later.
They are cut by tokens; what is at home near the device stays one tensor.

Dimension key: T tokens, D hidden features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexport.policy import Split, Tier
from flexport.schedule.order import Piece
from flexport.store.place import Dealer
from flexport.store.pool import Pool
from flexport.store.store import Kept, Lease, Store
from flexport.torch_ops import as_tensor

__all__ = ["HiddenStates"]

Pieces = tuple[Piece, ...]


@dataclass(slots=True, eq=False)
class _Away:
    """Tokens that were sent to a far tier."""

    kept: Kept
    shape: tuple[int, ...]
    dtype: torch.dtype
    lease: Lease | None = None


@dataclass(slots=True, eq=False)
class _States:
    near: Tensor | None = None
    near_bytes: int = 0
    away: list[_Away] = field(default_factory=list)


class HiddenStates:
    """The states of all groups of pieces under way."""

    def __init__(self, store: Store, split: Split) -> None:
        self._store = store
        self._dealer = Dealer(split)
        self._near = {Tier.DEVICE, Tier.HOST} if store.unified else {Tier.DEVICE}
        self._states: dict[Pieces, _States] = {}

    @property
    def used_bytes(self) -> tuple[int, int]:
        """Device and host bytes in which states lie now."""
        near_bytes = sum(states.near_bytes for states in self._states.values())
        host_bytes = sum(
            Pool.rounded(away.kept.num_bytes)
            for states in self._states.values()
            for away in states.away
            if away.kept.home is Tier.HOST
        )
        return near_bytes, host_bytes

    def put(self, pieces: Pieces, x_TD: Tensor) -> None:
        """Keep a group's states until its next layer; takes x_TD over."""
        states = _States()
        token_bytes = x_TD.shape[1] * x_TD.dtype.itemsize
        near_tokens = 0
        for part in self._dealer.cut([(x_TD.shape[0], token_bytes)]):
            if part.tier in self._near:
                near_tokens += part.num_rows
                key = ("activations", part.tier)
                self._store.placed_bytes[key] += part.num_rows * token_bytes
            else:
                states.away.append(self._send(x_TD[part.begin : part.end], part.tier))
        if near_tokens:
            # Near tiers come first in a cut. A part alone must not keep the whole alive.
            whole = near_tokens == x_TD.shape[0]
            states.near = x_TD if whole else x_TD[:near_tokens].clone()
            states.near_bytes = near_tokens * token_bytes
            self._store.device.reserve(states.near_bytes)
        self._states[pieces] = states

    def prefetch(self, pieces: Pieces) -> None:
        """Start fetching a group's states, if they are known already.

        They are needed at once, or nearly so, and weights of layers far ahead stand in line already.
        """
        states = self._states.get(pieces)
        for away in states.away if states else ():
            if away.lease is None:
                away.lease = self._store.fetch(away.kept, urgent=True)

    def take(self, pieces: Pieces) -> Tensor:
        """The group's states (T, D), which are the caller's from now on."""
        self.prefetch(pieces)
        states = self._states.pop(pieces)
        self._store.device.unreserve(states.near_bytes)
        if states.near is not None and not states.away:
            return states.near
        parts = [] if states.near is None else [states.near]
        for away in states.away:
            assert away.lease is not None
            away.lease.ticket.wait()
            parts.append(as_tensor(away.lease.bytes_B, 0, away.shape, away.dtype))
        x_TD = torch.cat(parts)
        for away in states.away:
            self._let_go(away)
        return x_TD

    def drop(self, pieces: Pieces) -> None:
        """Forget a group's states, if there are any."""
        states = self._states.pop(pieces, None)
        if states is not None:
            self._store.device.unreserve(states.near_bytes)
            for away in states.away:
                self._let_go(away)

    def close(self) -> None:
        """Forget all states."""
        for pieces in list(self._states):
            self.drop(pieces)

    def _send(self, x_TD: Tensor, tier: Tier) -> _Away:
        kept = self._store.keep("activations", x_TD.numel() * x_TD.dtype.itemsize, tier)
        lease = self._store.draft(kept)
        as_tensor(lease.bytes_B, 0, x_TD.shape, x_TD.dtype).copy_(x_TD)
        self._store.write_back(kept, lease)
        return _Away(kept, tuple(x_TD.shape), x_TD.dtype)

    def _let_go(self, away: _Away) -> None:
        if away.lease is not None:
            away.lease.release()
        self._store.drop(away.kept)

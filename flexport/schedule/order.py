"""The zig-zag order: for each sweep over the layers, for each layer, for each group of pieces.

A **batch** is a handful of rows that are decoded together; several are in flight at once and
share every sweep over the weights. A **piece** is the part of one batch that is computed at once:
in prefill prompt columns of some of its rows, in decode one new column of all its rows. So a
sweep is a list of pieces, and prefill, chunked prefill and decode differ only in their numbers.
A **visit** takes a group of pieces through one layer, in one product each. Because each batch
keeps its own place, a sweep may carry prompts of one batch and decode steps of others, so that
prompts are computed while weights are on their way.

Rows are aligned at the right: a batch's prompts end in column P - 1, where P is its longest
prompt, and step s of every row is column P + s - 1. A decode step therefore appends one column
for all rows, one contiguous record on any tier.

Source: the zig-zag block schedule is FlexGen's, arXiv:2303.06865, section 4.1, Algorithm 1.
There all batches of a block step together; that is the special case sweep_tokens = 0 and
equal lengths.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["BatchPlan", "Piece", "Rota", "Visit", "bands_of", "joined", "prefill_pieces", "zigzag"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What one visit computes of a batch: columns start .. stop-1 of some rows."""

    batch: int
    rows: tuple[int, int] | None
    """The range of rows that is prefilled; None is a decode step of all rows."""
    start: int
    stop: int
    num_tokens: int
    """Real tokens, at most; rows that ended early in decode need none."""

    def shares_rows_with(self, other: Piece) -> bool:
        """Whether both compute tokens of a same row."""
        if self.batch != other.batch:
            return False
        if self.rows is None or other.rows is None:
            return True
        return self.rows[0] < other.rows[1] and other.rows[0] < self.rows[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One step of the zig-zag: a group of pieces passes one layer, in one matrix product each."""

    sweep: int
    layer: int
    pieces: tuple[Piece, ...]
    first: bool
    """No earlier visit of this sweep needs the layer's weights."""
    last: bool
    """No later visit of this sweep needs the layer's weights."""


def bands_of(lengths: Sequence[int], max_tokens: int) -> list[tuple[int, int]]:
    """Cut rows with these prompt lengths into bands: row ranges of at most max_tokens places.

    A band has a place for each column of its longest row in each of its rows, used or not. A row
    longer than max_tokens has a band of its own, and is prefilled in several chunks.
    """
    bands: list[tuple[int, int]] = []
    begin, longest = 0, 0
    for row, length in enumerate(lengths):
        if row > begin and (row + 1 - begin) * max(longest, length) > max_tokens:
            bands.append((begin, row))
            begin, longest = row, 0
        longest = max(longest, length)
    bands.append((begin, len(lengths)))
    return bands


def prefill_pieces(batch: int, lengths: Sequence[int], max_tokens: int) -> list[Piece]:
    """The pieces that prefill a batch, in the order in which they must run."""
    columns = max(lengths)
    pieces = []
    for begin, end in bands_of(lengths, max_tokens):
        first = columns - max(lengths[begin:end])
        step = max_tokens if end - begin == 1 else columns
        for start in range(first, columns, step):
            stop = min(start + step, columns)
            num_tokens = sum(
                max(0, stop - max(start, columns - length)) for length in lengths[begin:end]
            )
            pieces.append(
                Piece(batch=batch, rows=(begin, end), start=start, stop=stop, num_tokens=num_tokens)
            )
    return pieces


class BatchPlan:
    """How far one batch has been planned. `ended` is set by whoever samples its tokens."""

    def __init__(self, batch: int, lengths: Sequence[int], max_steps: int, max_tokens: int) -> None:
        """A batch of rows with these prompt lengths that samples at most max_steps tokens a row."""
        self.batch = batch
        self.ended = False
        self._num_rows = len(lengths)
        self._prefill = deque(prefill_pieces(batch, lengths, max_tokens))
        self._next_column = max(lengths)
        # The first token is sampled from the prefill; each decode step samples one more.
        self._num_columns = max(lengths) + max_steps - 1

    def take(self, num_tokens: float) -> list[Piece]:
        """The batch's pieces for the next sweep: some of its prefill, or a decode step.

        Of its prefill goes what begins within the next num_tokens prompt tokens.
        """
        if self.ended:
            return []
        if self._prefill:
            pieces: list[Piece] = []
            while self._prefill and num_tokens > 0:
                num_tokens -= self._prefill[0].num_tokens
                pieces.append(self._prefill.popleft())
            return pieces
        if self._next_column < self._num_columns:
            return [self._decode_step()]
        return []

    def _decode_step(self) -> Piece:
        start = self._next_column
        self._next_column += 1
        return Piece(
            batch=self.batch, rows=None, start=start, stop=start + 1, num_tokens=self._num_rows
        )


def joined(pieces: Iterable[Piece], max_tokens: int) -> list[tuple[Piece, ...]]:
    """Groups of pieces that are computed together, of at most max_tokens tokens where it can be.

    A product of few tokens takes about as long as one of many, since it reads the same weights.
    """
    groups: list[list[Piece]] = []
    num_tokens = 0
    for piece in pieces:
        num_tokens += piece.num_tokens
        # A later chunk of the same prompt needs what an earlier one leaves in the cache.
        if (
            not groups
            or num_tokens > max_tokens
            or any(piece.shares_rows_with(other) for other in groups[-1])
        ):
            groups.append([])
            num_tokens = piece.num_tokens
        groups[-1].append(piece)
    return [tuple(group) for group in groups]


def zigzag(sweep: int, num_layers: int, groups: Sequence[tuple[Piece, ...]]) -> Iterator[Visit]:
    """All pieces pass a layer before any passes the next one."""
    for layer in range(num_layers):
        for index, pieces in enumerate(groups):
            yield Visit(
                sweep=sweep,
                layer=layer,
                pieces=pieces,
                first=index == 0,
                last=index == len(groups) - 1,
            )


class Rota:
    """Sweep after sweep, until no batch is left."""

    def __init__(
        self,
        num_layers: int,
        sweep_tokens: int,
        join_tokens: int,
        admit: Callable[[], Iterable[BatchPlan]],
        is_waiting: Callable[[], bool],
    ) -> None:
        """`admit` is asked before each sweep for batches that can join now.

        `is_waiting` says whether some can't join yet, because what batches that have ended hold
        comes free only when the visits fetched ahead for them have passed. sweep_tokens bounds
        the prompt tokens of a sweep on average; 0 is no bound. Pieces of up to join_tokens tokens are
        computed together; 0 keeps each of them to itself.
        """
        self._num_layers = num_layers
        self._sweep_tokens = sweep_tokens or math.inf
        self._left_tokens = 0.0
        self._join_tokens = join_tokens
        self._admit = admit
        self._is_waiting = is_waiting
        self._batches: list[BatchPlan] = []

    def visits(self) -> Iterator[Visit | None]:
        """The visits of the whole job. None means: not known before earlier visits are computed."""
        sweep = 0
        while True:
            self._batches = [plan for plan in self._batches if not plan.ended]
            self._batches.extend(self._admit())
            pieces = self._next_pieces()
            if pieces:
                yield from zigzag(sweep, self._num_layers, joined(pieces, self._join_tokens))
                sweep += 1
            elif self._batches or self._is_waiting():
                yield None
            else:
                return

    def _next_pieces(self) -> list[Piece]:
        # A piece goes whole, and what it is too much the next sweeps have less.
        self._left_tokens = min(self._left_tokens, 0) + self._sweep_tokens
        pieces = self._take_pieces()
        if not pieces:  # nobody decodes, so there is nothing to wait for
            self._left_tokens = self._sweep_tokens
            pieces = self._take_pieces()
        return pieces

    def _take_pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        for plan in self._batches:
            taken = plan.take(self._left_tokens)
            pieces.extend(taken)
            self._left_tokens -= sum(piece.num_tokens for piece in taken if piece.rows is not None)
        return pieces

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["BatchPlan", "Piece", "Rota", "Visit", "joined", "zigzag"]


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
    steps_only: bool
    """The whole sweep consists of decode steps."""

    def shares_pages_with(self, other: Visit) -> bool:
        """Whether one of the two needs cache that the other one writes."""
        return self.layer == other.layer and any(
            piece.shares_rows_with(before) for piece in self.pieces for before in other.pieces
        )


class BatchPlan:
    """How far one batch has been planned. `ended` is set by whoever samples its tokens."""

    def __init__(self, batch: int, lengths: Sequence[int], max_steps: int, max_tokens: int) -> None:
        """A batch of rows with these prompt lengths that samples at most max_steps tokens a row.

        A piece of its prefill has at most max_tokens tokens.
        """
        self.batch = batch
        self.ended = False
        self._lengths = list(lengths)
        self._max_tokens = max_tokens
        self._row = 0
        """The first row whose prompt is not planned to its end."""
        self._num_planned = 0
        """Tokens of that row that are."""
        self._prompt_columns = max(lengths)
        self._next_column = self._prompt_columns
        # The first token is sampled from the prefill; each decode step samples one more.
        self._num_columns = self._prompt_columns + max_steps - 1

    def take(self, num_tokens: float = math.inf) -> list[Piece]:
        """The batch's pieces for the next sweep: some of its prefill, or a decode step.

        Of its prefill goes as much as has num_tokens tokens.
        """
        if self.ended:
            return []
        if self._row < len(self._lengths):
            pieces: list[Piece] = []
            while self._row < len(self._lengths) and num_tokens >= 1:
                pieces.append(self._prompts(int(min(num_tokens, self._max_tokens))))
                num_tokens -= pieces[-1].num_tokens
            return pieces
        if self._next_column < self._num_columns:
            return [self._decode_step()]
        return []

    def _prompts(self, most: int) -> Piece:
        """The next prompts: whole rows that have `most` places together, or a chunk of one."""
        begin, end = self._row, self._fitting(most)
        if begin == end:
            return self._chunk(most)
        self._row = end
        lengths = self._lengths[begin:end]
        start = self._prompt_columns - max(lengths)
        return self._piece((begin, end), start, self._prompt_columns, sum(lengths))

    def _fitting(self, most: int) -> int:
        """Up to which row `most` places are enough: each has one for each column of the longest."""
        if self._num_planned:
            return self._row
        longest = 0
        for row in range(self._row, len(self._lengths)):
            longest = max(longest, self._lengths[row])
            if (row + 1 - self._row) * longest > most:
                return row
        return len(self._lengths)

    def _chunk(self, most: int) -> Piece:
        row, length = self._row, self._lengths[self._row]
        start = self._prompt_columns - length + self._num_planned
        stop = min(start + most, self._prompt_columns)
        self._num_planned += stop - start
        if self._num_planned == length:
            self._row, self._num_planned = row + 1, 0
        return self._piece((row, row + 1), start, stop, stop - start)

    def _decode_step(self) -> Piece:
        start = self._next_column
        self._next_column += 1
        return self._piece(None, start, start + 1, len(self._lengths))

    def _piece(self, rows: tuple[int, int] | None, start: int, stop: int, num_tokens: int) -> Piece:
        return Piece(batch=self.batch, rows=rows, start=start, stop=stop, num_tokens=num_tokens)


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
    steps_only = all(piece.rows is None for pieces in groups for piece in pieces)
    for layer in range(num_layers):
        for index, pieces in enumerate(groups):
            yield Visit(
                sweep=sweep,
                layer=layer,
                pieces=pieces,
                first=index == 0,
                last=index == len(groups) - 1,
                steps_only=steps_only,
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
        the prompt tokens of a sweep; 0 is no bound. Pieces of up to join_tokens tokens are computed
        together; 0 keeps each of them to itself.
        """
        self._num_layers = num_layers
        self._sweep_tokens = sweep_tokens or math.inf
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
        pieces: list[Piece] = []
        left_tokens = self._sweep_tokens
        for plan in self._batches:
            taken = plan.take(left_tokens)
            pieces.extend(taken)
            left_tokens -= sum(piece.num_tokens for piece in taken if piece.rows is not None)
        return pieces

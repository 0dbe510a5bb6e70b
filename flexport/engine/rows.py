"""Rows under way and the batches they run in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flexport.engine.cache import BatchCache
from flexport.schedule.order import BatchPlan, Piece

__all__ = ["Batch", "Done", "Row", "Token"]


@dataclass(slots=True, eq=False)
class Done:
    """What a job has to show: rows that were handed to whoever asked, and their tokens."""

    num_rows: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0

    def add(self, prompt_tokens: int, generated_tokens: int) -> None:
        """Count one more row."""
        self.num_rows += 1
        self.prompt_tokens += prompt_tokens
        self.generated_tokens += generated_tokens


@dataclass(slots=True, eq=False)
class Row:
    """One row under way: tokens that are given, and tokens that were sampled."""

    key: object
    """Whatever its owner knows it by."""
    prompt_ids: tuple[int, ...]
    logits_from: int
    """The first prompt token whose logits are wanted; generation wants the last one's only."""
    max_steps: int
    """Tokens that may be sampled; 1 means that the prompt is all that is computed."""
    sampled_ids: list[int] = field(default_factory=list)
    ended: bool = False

    @property
    def limit(self) -> int:
        """Tokens that the row may come to, the last one sampled left out."""
        return len(self.prompt_ids) + self.max_steps - 1


class Token(NamedTuple):
    """A token that is computed: its id, its place, and its row's lengths."""

    token_id: int
    position: int
    length: int
    """Tokens that its row has: the whole prompt, or all up to this one."""
    limit: int
    """Tokens that its row may come to."""


@dataclass(slots=True, eq=False)
class Batch:
    """Rows that are decoded together; all end in the same column."""

    index: int
    rows: Sequence[Row]
    plan: BatchPlan
    cache: BatchCache
    num_columns: int
    """Prompt columns: the length of the longest prompt."""

    def keeps(self, piece: Piece) -> bool:
        """Whether a later visit will ask for the keys and values of this piece."""
        return piece.stop < self.num_columns or any(row.max_steps > 1 for row in self.rows)

    def start(self, index: int) -> int:
        """The column of a row's first token."""
        return self.num_columns - len(self.rows[index].prompt_ids)

    def live(self, piece: Piece) -> list[int]:
        """The rows of the piece that are still going, in order."""
        rows = range(*(piece.rows or (0, len(self.rows))))
        return [index for index in rows if not self.rows[index].ended]

    def num_tokens(self, piece: Piece) -> int:
        """Tokens of the piece that are computed."""
        live = self.live(piece)
        if piece.rows is None:
            return len(live)
        return sum(piece.stop - max(piece.start, self.start(index)) for index in live)

    def tokens(self, piece: Piece) -> list[Token]:
        """The piece's tokens, row by row."""
        tokens: list[Token] = []
        for index in self.live(piece):
            row, start = self.rows[index], self.start(index)
            if piece.rows is None:
                token_id = row.sampled_ids[piece.start - self.num_columns]
                tokens.append(Token(token_id, piece.start - start, piece.stop - start, row.limit))
            else:
                first, last = max(piece.start, start) - start, piece.stop - start
                length = len(row.prompt_ids)
                tokens.extend(
                    Token(row.prompt_ids[position], position, length, row.limit)
                    for position in range(first, last)
                )
        return tokens

    def wanted(self, piece: Piece) -> tuple[list[tuple[Row, int]], list[int]]:
        """Whose logits are wanted: (row, how many tokens), and the tokens' places in the piece."""
        rows: list[tuple[Row, int]] = []
        places: list[int] = []
        at = 0
        for index in self.live(piece):
            row, start = self.rows[index], self.start(index)
            first, last = max(piece.start, start) - start, piece.stop - start
            begin = max(first, row.logits_from)
            if begin < last:
                rows.append((row, last - begin))
                places.extend(range(at + begin - first, at + last - first))
            at += last - first
        return rows, places

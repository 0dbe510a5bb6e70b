"""The nouns of a job's input: a row that can be tried, and a row that can't."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flexport.records import RowForm

__all__ = ["BadRow", "Chat", "Row"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A prompt that is a conversation; the model's chat template makes text of it."""

    messages: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the input, its types checked, not yet tokenised."""

    id: str | int
    """As the user wrote it, so that the answer carries the very same value."""
    line: int
    form: RowForm
    prompt: str | tuple[int, ...] | Chat
    """Text, token ids, or a conversation."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The row's own fields of SamplingParams; they win over the command line's."""
    model: str | None = None
    """What an OpenAI body named; kept for the answer, otherwise ignored."""

    @property
    def key(self) -> str:
        """What must be unique in a job: 7 and "7" are one id."""
        return str(self.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One line of the input that can't be run, and why."""

    id: str | int
    """The line number as text where the line has no readable id of its own."""
    line: int
    form: RowForm
    code: str
    message: str
    model: str | None = None

    @property
    def key(self) -> str:
        """As `Row.key`."""
        return str(self.id)

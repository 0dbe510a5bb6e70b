"""Several measurements of one thing: their median, and how far they lie apart. No torch here."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Spread"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A median and its measurements, in the order in which they were taken."""

    median: float
    spread: float
    """(largest - smallest) / median: 0.05 means that all lie within five per cent."""
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one measurement."""
        median = statistics.median(values)
        width = max(values) - min(values)
        return cls(median=median, spread=width / median if median else 0.0, values=tuple(values))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spread:
        """What dataclasses.asdict gave."""
        return cls.of(tuple(data["values"]))

"""What a job has taken from its source and not finished: what it would have to do again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain, islice
from typing import Generic, TypeVar

__all__ = ["InFlight"]

T = TypeVar("T", bound=Hashable)


class InFlight(Generic[T]):
    """Items on their way from a source, which may be endless and is read once.

    Only those that were taken and are not done are held. Equal ones stand for each other.
    """

    def __init__(self, source: Iterable[T]) -> None:
        self.source_error: BaseException | None = None
        """What the source raised, if it did: then there is nothing to go on with."""
        self._left: Counter[T] = Counter()
        self._new = self._take(iter(source))

    def __len__(self) -> int:
        return self._left.total()

    def peek(self, count: int) -> list[T]:
        """Take so many items, or as many as there are."""
        return list(islice(self._new, count))

    def remaining(self) -> Iterator[T]:
        """All that is not done: what was taken before, and then the rest of the source."""
        return chain(list(self._left.elements()), self._new)

    def done(self, item: T) -> None:
        """The item need not be done again."""
        self._left[item] -= 1
        if not self._left[item]:
            del self._left[item]

    def _take(self, source: Iterator[T]) -> Iterator[T]:
        while True:
            try:
                item = next(source)
            except StopIteration:
                return
            except BaseException as error:
                self.source_error = error
                raise
            self._left[item] += 1
            yield item

"""What the broken backends are made of, and the list that they enter themselves into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from flexport.testing import DiscreteBackend

Place = Literal["device", "host"]

Catch = tuple[type, str]

CATCHES: list[Catch] = []
"""Broken backends, each with a law that it breaks."""


def breaks(*laws: str) -> Callable[[type], type]:
    """Enter a class into the list."""

    def enter(broken: type) -> type:
        CATCHES.extend((broken, law) for law in laws)
        return broken

    return enter


class Told:
    """A ticket that calls what it is told to."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def wait(self) -> None:
        self._call()

    def join(self) -> None:
        self._call()


class Late(DiscreteBackend):
    """Copies as late as the contract allows; right as it is."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        super().__init__(memory_bytes=memory_bytes, late=True)

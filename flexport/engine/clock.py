"""Where a job's time goes: prefill or decode, computing or waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from flexport.engine.trace import COMPUTE
from flexport.store.lanes import Watch

__all__ = ["Clock"]


class Clock:
    """Seconds of one job, as its visits pass."""

    def __init__(self, watch: Watch | None = None) -> None:
        """`watch` is told of all computing and waiting."""
        self._watch = watch
        self.prefill_s = 0.0
        self.decode_s = 0.0
        self.compute_s = 0.0
        self.wait_s = 0.0
        self._lap_started_s = time.perf_counter()

    def start(self) -> None:
        """A job begins now; what went before is not counted."""
        self._lap_started_s = time.perf_counter()

    def lap(self, *, decode_share: float) -> None:
        """A visit has ended: all time since the last one was its.

        A visit that decodes some tokens and prefills others counts for both, by their numbers.
        """
        now_s = time.perf_counter()
        elapsed_s = now_s - self._lap_started_s
        self._lap_started_s = now_s
        self.decode_s += elapsed_s * decode_share
        self.prefill_s += elapsed_s * (1 - decode_share)

    @contextmanager
    def computing(self, label: str) -> Iterator[None]:
        """Count the body as computing."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.compute_s += self._passed_s(started_s, label)

    @contextmanager
    def waiting(self, label: str) -> Iterator[None]:
        """Count the body as waiting for copies."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.wait_s += self._passed_s(started_s, f"waiting for {label}")

    def _passed_s(self, started_s: float, label: str) -> float:
        ended_s = time.perf_counter()
        if self._watch is not None:
            self._watch(COMPUTE, 0, label, started_s, ended_s)
        return ended_s - started_s

"""How long something takes on a device, and the line that several sizes of it lie on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flexport.backend import Backend
from flexport.bench.spread import Spread
from flexport.planner.machine import Lane

__all__ = ["Effort", "Line", "Timed", "fit_lane", "fit_line", "seconds_of", "seconds_of_each"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What measuring may take. The numbers that are found do not depend on it, their spread does."""

    memory_bytes: int = 1 << 30
    """Of device and host together, what Python and torch take themselves left out."""
    disk_bytes: int = 2 << 30
    """The file that is written and read."""
    kernel_s: float = 0.2
    """One measurement of a kernel."""
    disk_s: float = 1.5
    """One of the disk, long enough for its own cache to be out of it."""
    rounds: int = 5
    """Measurements of each kind; the median counts."""
    decode_steps: int = 24
    """Of the tiny models that tell what a visit costs."""

    @property
    def pool_bytes(self) -> int:
        """What one measurement keeps: some have a plain and a packed form of it, and copies."""
        return self.memory_bytes // 4


class Timed:
    """Something that is timed again and again, often enough in each round to be told."""

    def __init__(self, backend: Backend, act: Callable[[], object], round_s: float) -> None:
        """A round takes about `round_s`, or as long as doing it once."""
        self._backend = backend
        self._act = act
        self._round(1)  # the first call may choose kernels, and touches memory for the first time
        self.about_s = min(self._round(1), self._round(1))
        """What once takes, roughly."""
        self._count = max(1, int(round_s / max(self.about_s, 1e-9)))

    def round(self) -> float:
        """Seconds of once, which end when the device has done all of it."""
        return self._round(self._count)

    def _round(self, count: int) -> float:
        started_s = time.perf_counter()
        for _ in range(count):
            self._act()
        self._backend.sync()
        return (time.perf_counter() - started_s) / count


def seconds_of_each(timed: Sequence[Timed], rounds: int) -> list[Spread]:
    """How long each takes: they go in turn, so that what disturbs for a while falls on all a little."""
    found = [[each.round() for each in timed] for _ in range(rounds)]
    return [Spread.of(values) for values in zip(*found, strict=True)]


def seconds_of(
    backend: Backend, act: Callable[[], object], seconds: float, rounds: int = 5
) -> Spread:
    """How long `act` takes, of so many rounds that together take about `seconds`."""
    return seconds_of_each([Timed(backend, act, seconds / rounds)], rounds)[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """y = start + slope * x."""

    start: float
    slope: float


def fit_line(points: Sequence[tuple[float, float]]) -> Line:
    """The line that is least off at the points (x, y), in shares of y: small ones count as much.

    It neither starts below 0 nor falls, as no time does: where the best line would, the better of
    the two lines that just don't is taken.
    """
    assert len({x for x, _ in points}) > 1, points
    assert all(y > 0 for _, y in points), points
    # Weighted least squares: each residual is divided by its y.
    weights = [1 / y**2 for _, y in points]
    total = sum(weights)
    mean_x = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    joint = sum(w * (x - mean_x) * (y - mean_y) for w, (x, y) in zip(weights, points, strict=True))
    slope = joint / spread
    start = mean_y - slope * mean_x
    if slope < 0:
        return Line(start=mean_y, slope=0.0)
    if start < 0:
        squares = sum(w * x * x for w, (x, _) in zip(weights, points, strict=True))
        through_0 = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / squares
        return Line(start=0.0, slope=through_0)
    return Line(start=start, slope=slope)


def fit_lane(seconds: Sequence[tuple[int, float]]) -> Lane:
    """The lane on which copies of so many bytes take so many seconds each; two sizes at least."""
    line = fit_line([(float(num_bytes), each_s) for num_bytes, each_s in seconds])
    largest_bytes, largest_s = max(seconds)
    # Sizes that all take the same are bound by the copy: its rate is at least what was seen.
    slope = line.slope or largest_s / largest_bytes
    return Lane(bytes_per_s=1 / slope, copy_s=line.start)

"""`--policy auto`: the best whole plan.

For a block of given shape the nine shares are a linear program (`shares`). This is the search around
it: shapes are tried far apart, and from the best of them it goes on step by step to whatever shape
beside is better, until none is. What is best is the job's predicted rate, by `predict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from flexport.errors import DoesNotFit
from flexport.planner.machine import Lane
from flexport.planner.refusal import check, missing_bytes
from flexport.planner.shapes import Shape, Shapes
from flexport.planner.shares import best_shares, smallest
from flexport.planner.task import Planned, Task
from flexport.policy import Policy
from flexport.units import format_bytes

__all__ = ["Gain", "Point", "choose", "frontier", "gains", "need_room", "undominated"]

Point = tuple[float, float, Policy]
"""Seconds of a block, generated tokens a second of the whole job, and what does it."""

CLIMBS = 2
"""Of each kind of shapes, how many a search goes on from: there may be a best one of few rows with
their cache in memory, and another one of many."""

HOPEFUL = 0.5
"""Of the best rate found, what the second of a kind has to have for it to be worth going on from."""

WORTH = 1.002
"""A larger block has to be so much faster: one waits longer for it."""

LANE_FIELDS = {
    "disk_to_host": "disk_read",
    "host_to_disk": "disk_write",
    "host_to_device": "up",
    "device_to_host": "down",
}
"""Of a machine, what each lane's numbers are called."""

MORE_BYTES = 1 << 30
MORE_BYTES_PER_S = 1e9
"""What `gains` are of."""


def choose(task: Task) -> Planned:
    """The best policy that fits. Raises DoesNotFit, with the smallest memory that would do.

    Or with the smallest latency, where it is that.
    """
    search = _Search(task)
    search.climb()
    return search.best()


def need_room(task: Task) -> Policy:
    """The policy that takes least. Raises DoesNotFit if it is too much, much sooner than `choose`."""
    shapes = Shapes(task)
    least = [
        policy
        for block in map(shapes.block, shapes.smallest())
        if block is not None
        for policy in smallest(block, task)
    ]
    policy = min(least, key=lambda each: missing_bytes(task.needs(each), task.budgets))
    check(task.needs(policy), policy, task.budgets)
    return policy


def frontier(task: Task) -> list[Point]:
    """The plans that no other one beats in both latency and throughput, the quickest block first.

    The last is the best of all. Raises DoesNotFit as `choose` does.
    """
    search = _Search(replace(task, choice=replace(task.choice, max_latency_s=None)))
    search.climb()
    search.try_all(search.shapes.like(search.shapes.of(search.best().policy)))
    return undominated((each.predicted.block_s, each.tok_s, each.policy) for each in search.found)


def undominated(points: Iterable[Point]) -> list[Point]:
    """Those that no other one is both as quick as and faster than, the quickest first."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each[0], -each[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What more of something would bring."""

    what: str
    """A tier's name, or a lane's."""
    more: str
    """How much more, for people."""
    tok_s: float
    """What is predicted then, never less than before."""


def gains(task: Task, planned: Planned) -> list[Gain]:
    """What one more GiB of each tier, and one more GB/s of each lane, would bring.

    The block may change by a step; to see what a whole new plan would bring, choose one.
    """
    listed = []
    for what, more, richer in _richer(task):
        search = _Search(richer)
        shape = search.shapes.of(planned.policy)
        search.try_all([shape, *search.shapes.sized(shape)])
        found = [each.tok_s for each in search.found if search.meets(each)]
        same = richer.planned(planned.policy).tok_s
        listed.append(Gain(what=what, more=more, tok_s=max([same, *found])))
    return listed


class _Search:
    """Shapes that were tried, and what was found."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.shapes = Shapes(task)
        self._known: dict[Policy, Planned | None] = {}

    @property
    def found(self) -> list[Planned]:
        """All that fit."""
        return [each for each in self._known.values() if each is not None]

    def meets(self, planned: Planned) -> bool:
        """Whether its block is quick enough."""
        most_s = self.task.choice.max_latency_s
        return most_s is None or planned.predicted.block_s <= most_s

    def try_all(self, shapes: Iterable[Shape]) -> list[tuple[tuple[float, float], Shape]]:
        """Those that fit, best first, with how good they are."""
        tried = [(self._rank(planned), shape) for shape in shapes if (planned := self._try(shape))]
        return sorted(tried, key=lambda pair: pair[0], reverse=True)

    def climb(self) -> None:
        """From the best shapes of each kind to begin with, go on to better ones beside them."""
        if not self.try_all(self.shapes.smallest()):
            need_room(self.task)
        tried = [self.try_all(shapes) for shapes in self.shapes.starts()]
        best = max((self._climb(*listed[0]) for listed in tried if listed), default=(0.0, 0.0))
        for listed in tried:
            for rank, shape in listed[1:CLIMBS]:
                if rank[0] < best[0] or rank[1] > HOPEFUL * best[1]:
                    self._climb(rank, shape)

    def _climb(self, rank: tuple[float, float], shape: Shape) -> tuple[float, float]:
        """Go on from one shape; how good the last one is."""
        before = None
        while before != rank:
            before = rank
            for way in self.shapes.ways:
                for better in self.try_all(way(shape))[:1]:
                    rank, shape = max((rank, shape), better, key=lambda pair: pair[0])
        return rank

    def best(self) -> Planned:
        """The best of what was tried; of blocks that come to nearly the same, the smallest."""
        found = self.found
        quick = [each for each in found if self.meets(each)]
        if not quick:
            raise self._too_slow(min(each.predicted.block_s for each in found))
        most = max(each.tok_s for each in quick)
        near = [each for each in quick if WORTH * each.tok_s >= most]
        return min(near, key=lambda each: (each.policy.block_size, -each.tok_s))

    # ---- inside

    def _try(self, shape: Shape) -> Planned | None:
        block = self.shapes.block(shape)
        if block is None:
            return None
        if block not in self._known:
            self._known[block] = best_shares(block, self.task)
        return self._known[block]

    def _rank(self, planned: Planned) -> tuple[float, float]:
        """The larger the better; what takes too long is the better the sooner it is done."""
        if self.meets(planned):
            return 1.0, planned.tok_s
        return 0.0, -planned.predicted.block_s

    def _too_slow(self, least_s: float) -> DoesNotFit:
        return DoesNotFit(
            f"no block takes as little as --max-latency {self.task.choice.max_latency_s:g} seconds from "
            f"its first prompt to its last token; the least that would do is {_rounded_up(least_s)}"
        )


def _rounded_up(seconds: float) -> str:
    """A number for people that is not below `seconds`."""
    digit = 10.0 ** (math.floor(math.log10(seconds)) - 2) if seconds > 0 else 1.0
    return f"{math.ceil(seconds / digit * (1 + 1e-9)) * digit:.12g}"


def _richer(task: Task) -> Iterator[tuple[str, str, Task]]:
    """The task with more of each thing that it has: its name, how much more, and the task."""
    budgets, machine = task.budgets, task.machine
    for tier in ("device", "host", "disk"):
        if tier == "host" and machine.unified:
            continue
        name = f"{tier}_bytes"
        own = replace(budgets, **{name: getattr(budgets, name) + MORE_BYTES})
        yield tier, format_bytes(MORE_BYTES), replace(task, budgets=own)
    for lane, field in LANE_FIELDS.items():
        found: Lane | None = getattr(machine, field)
        if found is None:
            continue
        faster = replace(found, bytes_per_s=found.bytes_per_s + MORE_BYTES_PER_S)
        richer: dict[str, Any] = {field: faster}
        yield lane, "1 GB/s", replace(task, machine=replace(machine, **richer))

"""What waiting longer buys: the plans that no other one beats in both latency and throughput.

Latency is the time of one block, from its first prompt to its last token: rows in flight together
are answered together, more or less, and the more they are, the longer each of them takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from flexport.engine.planning import Planning
from flexport.errors import DoesNotFit
from flexport.planner.auto import BATCH_ROWS, BLOCK_SIZES, Choice
from flexport.planner.footprint import JobSizes
from flexport.policy import Budgets, Policy

__all__ = ["Point", "frontier"]

Point = tuple[float, float, Policy]
"""Latency in seconds, generated tokens a second of the whole job, and what does it."""


def frontier(planning: Planning, job: JobSizes, budgets: Budgets, choice: Choice) -> list[Point]:
    """The best plans of all block sizes, the quickest answer first. Raises DoesNotFit if none fits."""
    found: list[Point] = []
    refusal: DoesNotFit | None = None
    for shape in _shapes(job, choice):
        try:
            policy = planning.plan(job, budgets, choice=shape).policy
        except DoesNotFit as error:
            refusal = refusal or error
            continue
        block = replace(job, num_rows=policy.block_size)
        latency_s = planning.predict(block, policy).run_s
        found.append((latency_s, planning.predict(job, policy).tok_s, policy))
    if not found:
        assert refusal is not None, choice
        raise refusal
    return _undominated(found)


def _shapes(job: JobSizes, choice: Choice) -> Iterator[Choice]:
    """The choice as it is, and with each block size that it leaves open."""
    yield choice
    if choice.batch_size is not None and choice.num_batches is not None:
        return
    for size in BLOCK_SIZES:
        if job.num_rows is not None and size > job.num_rows:
            return
        batch_size = choice.batch_size or min(size, BATCH_ROWS)
        yield replace(
            choice,
            batch_size=batch_size,
            num_batches=choice.num_batches or max(1, size // batch_size),
        )


def _undominated(points: list[Point]) -> list[Point]:
    """Those that no other one is both as quick as and faster than."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda each: (each[0], -each[1])):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept

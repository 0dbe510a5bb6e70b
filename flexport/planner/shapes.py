"""Shapes of a block: how many rows share a sweep, in which batches, and what else isn't a share."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from flexport.planner.footprint import JobSizes
from flexport.planner.task import Choice, Task
from flexport.policy import Policy, Split

__all__ = ["Shape", "Shapes", "paced_tokens"]

MOST_ROWS = 1024
"""Of a block. Streamed weights cost next to nothing a row by then, and every row's state is kept."""

STEP = 1.3
"""How much larger the next size of a block is at least."""

BATCH_ROWS = 64
"""Rows of a micro-batch to begin with."""

PACED_BATCH_ROWS = 8
"""The same where prompts are paced: few, since all of them wait for the last one's prompt."""

FEWEST_ROWS = 4
"""Of a micro-batch, where there are more: each has kernel calls of its own in every layer."""

PACED_BATCHES = 4
"""Batches that pacing needs at least: one of them is always being prefilled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a search varies from one linear program to the next."""

    rows: int
    batch_rows: int
    paced: bool
    cpu_attention: bool
    cpu_projections: bool
    compress_weights: str
    compress_cache: str


class Shapes:
    """The shapes that a task allows, and which are next to which."""

    def __init__(self, task: Task) -> None:
        self._job: JobSizes = task.job
        self._choice: Choice = task.choice
        self._most_positions = max(sizes.max_positions for sizes, _ in task.models.values())
        free = (False,) if task.machine.unified else (True, False)
        self._attends = _either(task.choice.cpu_attention, free)
        self._projects = _either(task.choice.cpu_projections, free[::-1])

    # ---- walking

    def starts(self) -> Iterator[list[Shape]]:
        """Shapes far apart, those of a kind together."""
        sizes = sorted({self.sizes[0], *self.sizes[:: -max(1, len(self.sizes) // 5)]})
        for paced in (False, True):
            for attends in self._attends:
                yield [replace(self._shape(rows, paced), cpu_attention=attends) for rows in sizes]

    @property
    def ways(self) -> tuple[Callable[[Shape], Iterator[Shape]], ...]:
        """Ways to go on from a shape: each gives some that differ in one thing, by one step."""
        return self.sized, self._batched, self._compressed, self._helped

    def sized(self, shape: Shape) -> Iterator[Shape]:
        """The next smaller and the next larger one."""
        sizes = self.sizes
        at = sizes.index(shape.rows)
        for rows in (*sizes[max(0, at - 1) : at], *sizes[at + 1 : at + 2]):
            whole = self._batch_rows(rows, shape.paced) if shape.paced else rows
            for batch_rows in {shape.batch_rows, self._batch_rows(rows, shape.paced), whole}:
                yield replace(shape, rows=rows, batch_rows=min(rows, batch_rows))

    def _batched(self, shape: Shape) -> Iterator[Shape]:
        """In batches of half or twice the rows; or paced, or not."""
        fewest = min(FEWEST_ROWS, self._batch_rows(shape.rows, shape.paced))
        for batch_rows in (shape.batch_rows // 2, 2 * shape.batch_rows):
            yield replace(shape, batch_rows=min(shape.rows, max(fewest, batch_rows)))
        batch_rows = self._batch_rows(shape.rows, not shape.paced)
        yield replace(shape, paced=not shape.paced, batch_rows=batch_rows)

    def _compressed(self, shape: Shape) -> Iterator[Shape]:
        """With other codecs."""
        for codec in self._choice.weight_codecs:
            yield replace(shape, compress_weights=codec)
        for codec in self._choice.cache_codecs:
            yield replace(shape, compress_cache=codec, paced=shape.paced and codec == "none")

    def _helped(self, shape: Shape) -> Iterator[Shape]:
        """With the CPU doing more or less beside the device."""
        for attends in self._attends:
            yield replace(shape, cpu_attention=attends)
        for projects in self._projects:
            yield replace(shape, cpu_projections=projects)

    def like(self, shape: Shape) -> Iterator[Shape]:
        """All of the same codecs, in few ways to make batches of them."""
        for rows, paced in product(self.sizes, (False, True)):
            usual = self._batch_rows(rows, paced)
            for batch_rows in {usual, min(rows, shape.batch_rows)}:
                yield replace(shape, rows=rows, batch_rows=batch_rows, paced=paced)
            yield from self._helped(replace(shape, rows=rows, batch_rows=usual, paced=paced))

    def smallest(self) -> Iterator[Shape]:
        """Those that may take least memory: fewest rows, and whatever else there is to choose."""
        for paced, attends, projects, weights, cache in product(
            (False, True),
            self._attends,
            self._projects,
            self._choice.weight_codecs,
            self._choice.cache_codecs,
        ):
            yield replace(
                self._shape(self.sizes[0], paced),
                cpu_attention=attends,
                cpu_projections=projects,
                compress_weights=weights,
                compress_cache=cache,
            )

    def of(self, policy: Policy) -> Shape:
        """The shape that a policy has, or the next smaller one."""
        at = bisect_right(self.sizes, policy.block_size) - 1
        return Shape(
            rows=self.sizes[max(0, at)],
            batch_rows=policy.batch_size,
            paced=policy.sweep_tokens > 0 and self._choice.sweep_tokens is None,
            cpu_attention=policy.cpu_attention,
            cpu_projections=policy.cpu_projections,
            compress_weights=policy.compress_weights,
            compress_cache=policy.compress_cache,
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Rows of a block, rising. Of a job that is known, blocks come out even."""
        most = min(self._job.num_rows or MOST_ROWS, MOST_ROWS)
        if self._choice.batch_size and self._choice.num_batches:
            return [self._choice.batch_size * self._choice.num_batches]
        whole = self._job.num_rows or MOST_ROWS
        even = sorted({math.ceil(whole / parts) for parts in range(1, whole + 1)})
        sizes: list[int] = []
        for rows in reversed([size for size in even if size <= most]):
            if not sizes or sizes[-1] >= STEP * rows or rows == 1:
                sizes.append(rows)
        return sizes[::-1]

    # ---- as a policy

    def block(self, shape: Shape) -> Policy | None:
        """The policy of a shape, all splits still to be found; None if there can be none."""
        choice, job = self._choice, self._job
        batch_size, num_batches = self._batches(shape)
        sweep_tokens = choice.sweep_tokens or 0
        if shape.paced:
            if (
                num_batches < PACED_BATCHES
                or choice.sweep_tokens is not None
                or job.mean_new < 2
                or shape.compress_cache != "none"
            ):
                return None
            sweep_tokens = paced_tokens(job, batch_size, num_batches)
        everything = Split(device=0.0, disk=1.0)
        return Policy(
            weights=choice.weights or everything,
            cache=choice.cache or everything,
            activations=choice.activations or everything,
            batch_size=batch_size,
            num_batches=num_batches,
            prefill_tokens=choice.prefill_tokens or min(2048, max(256, self._most_positions)),
            sweep_tokens=sweep_tokens,
            cpu_attention=shape.cpu_attention,
            cpu_projections=shape.cpu_projections,
            compress_weights=shape.compress_weights,
            compress_cache=shape.compress_cache,
            attn_sparsity=choice.attn_sparsity,
        )

    # ---- inside

    def _shape(self, rows: int, paced: bool) -> Shape:
        caches = self._choice.cache_codecs
        return Shape(
            rows=rows,
            batch_rows=self._batch_rows(rows, paced),
            paced=paced,
            cpu_attention=self._attends[0],
            cpu_projections=self._projects[0],
            compress_weights=self._choice.weight_codecs[-1],
            # A paced block has no other; where it may not be that, there is none.
            compress_cache="none" if paced and "none" in caches else caches[-1],
        )

    def _batch_rows(self, rows: int, paced: bool) -> int:
        if paced:
            return min(PACED_BATCH_ROWS, max(1, rows // PACED_BATCHES))
        return min(BATCH_ROWS, rows)

    def _batches(self, shape: Shape) -> tuple[int, int]:
        """Rows of a batch, and batches: as even as can be."""
        fixed = self._choice
        if fixed.batch_size:
            num_batches = fixed.num_batches or math.ceil(shape.rows / fixed.batch_size)
            return fixed.batch_size, num_batches
        num_batches = fixed.num_batches or math.ceil(shape.rows / shape.batch_rows)
        return math.ceil(shape.rows / num_batches), num_batches


def paced_tokens(job: JobSizes, batch_size: int, num_batches: int) -> int:
    """Prompt tokens of a sweep at which as much comes in as ends, when all slots are in use."""
    rows_a_sweep = (num_batches - 1) * batch_size / (job.mean_new - 1)
    return math.ceil(rows_a_sweep * job.mean_prompt)


def _either(fixed: bool | None, free: tuple[bool, ...]) -> tuple[bool, ...]:
    return free if fixed is None else (fixed,)

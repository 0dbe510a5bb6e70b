"""What visits move of a row's cache in one layer: whole pages, as `engine/cache` moves them.

A page that is written to goes home as a whole, so the newest one goes up and down the link with
every decode step; to disk it goes once, when its last column is filled, and never if it is the
very last. Chunks of a prompt write the pages that they reach, and fetch those before them.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

from flexport.planner.columns import edges_of, first_seen, page_widths
from flexport.planner.footprint import LayerCaches

__all__ = ["PromptPages", "StepPages", "mean_step_pages", "prompt_pages", "step_pages"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptPages:
    """Bytes that some columns of a prompt move, of one row in one layer."""

    fetched_bytes: int
    written_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPages:
    """Bytes that a decode step moves, of one row in one layer."""

    complete_bytes: float
    """Of pages that have all their columns, as they rest."""
    newest_bytes: float
    """Of the page that grows, before the step; 0 if the step begins it."""
    grown_bytes: float
    """What the step leaves: that page, or its packed form if it is complete."""
    completed_bytes: float
    """Of the page that rests from now on, if it is another one than the last."""
    num_pages: float
    """That are attended to."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """A row's pages in one layer."""

    edges: tuple[int, ...]
    num_prompt_pages: int
    resting: tuple[int, ...]
    """Bytes up to each page's first column, if all pages rest; and of all."""
    growing: tuple[int, ...]
    """Bytes of each page while it is not complete."""
    kept_columns: int
    """Of the prompt."""


@lru_cache(maxsize=1024)
def _layout(caches: LayerCaches, prompt: int, decoded: int, page_tokens: int) -> _Layout:
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, caches.window, caches.group)
    edges = edges_of((*of_prompt, *of_decoded))
    growing = [caches.page_row_bytes(width) for width in (*of_prompt, *of_decoded)]
    resting = list(growing)
    if caches.packed:
        # What is decoded last is never packed, and may be no whole group.
        whole = len(growing) - 1 if of_decoded else len(growing)
        resting[:whole] = (caches.packed_row_bytes(b - a) for a, b in pairwise(edges[: whole + 1]))
    return _Layout(
        tuple(edges),
        len(of_prompt),
        (0, *accumulate(resting)),
        tuple(growing),
        sum(of_prompt),
    )


@lru_cache(maxsize=4096)
def prompt_pages(
    caches: LayerCaches, prompt: int, begin: int, end: int, page_tokens: int
) -> PromptPages:
    """Of columns begin .. end-1 of a batch whose longest prompt has `prompt` columns.

    A row's first columns come with all pages before them, since nobody else clears these.
    """
    layout = _layout(caches, prompt, 0, page_tokens)
    if caches.packed:
        # What is not complete stays near the device, exact.
        return PromptPages(
            fetched_bytes=0, written_bytes=layout.resting[-1] if end >= prompt else 0
        )
    if layout.kept_columns < prompt:  # what a window keeps moves up with every chunk
        first, before, after = 0, layout.num_prompt_pages, layout.num_prompt_pages
    else:
        first = _page_of(layout.edges, begin) if begin else 0
        before = _page_of(layout.edges, begin - 1) + 1 if begin else 0
        after = _page_of(layout.edges, end - 1) + 1
    return PromptPages(
        fetched_bytes=layout.resting[before] if begin else 0,
        written_bytes=layout.resting[after] - layout.resting[first],
    )


@lru_cache(maxsize=4096)
def step_pages(
    caches: LayerCaches, prompt: int, step: int, last: int, page_tokens: int
) -> StepPages:
    """Of a batch's decode step, counted from 1; `last` is the last one that it may take."""
    layout = _layout(caches, prompt, last, page_tokens)
    edges, column = layout.edges, layout.kept_columns + step - 1
    number = _page_of(edges, column)
    first = min(first_seen(edges, column, caches.window), number)
    is_new = column == edges[number]
    is_complete = column + 1 == edges[number + 1] < edges[-1]
    resting_bytes = layout.resting[number + 1] - layout.resting[number]
    return StepPages(
        complete_bytes=layout.resting[number] - layout.resting[first],
        newest_bytes=0 if is_new else layout.growing[number],
        grown_bytes=resting_bytes if is_complete else layout.growing[number],
        completed_bytes=resting_bytes if is_complete else 0,
        num_pages=number + 1 - first,
    )


@lru_cache(maxsize=256)
def mean_step_pages(caches: LayerCaches, prompt: int, last: int, page_tokens: int) -> StepPages:
    """The mean of a batch's decode steps, of which there are `last`."""
    steps = [step_pages(caches, prompt, step, last, page_tokens) for step in range(1, last + 1)]
    return StepPages(
        complete_bytes=sum(each.complete_bytes for each in steps) / last,
        newest_bytes=sum(each.newest_bytes for each in steps) / last,
        grown_bytes=sum(each.grown_bytes for each in steps) / last,
        completed_bytes=sum(each.completed_bytes for each in steps) / last,
        num_pages=sum(each.num_pages for each in steps) / last,
    )


def _page_of(edges: Sequence[int], column: int) -> int:
    return bisect_right(edges, column) - 1

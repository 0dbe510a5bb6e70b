"""Pages that visits move: whole ones, each to disk once, and no more than a window shows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.planner.columns import GROUP_TOKENS
from flexport.planner.footprint import LayerCaches
from flexport.planner.moved_pages import mean_step_pages, prompt_pages, step_pages

KIB = 1 << 10
CACHE = LayerCaches(num_layers=1, plane_token_bytes=4 * KIB)
"""A column of a row takes 8 KiB, so that every page is whole grains."""
COLUMN = 8 * KIB
PACKED = LayerCaches(num_layers=1, plane_token_bytes=4 * KIB, packed=(140 * KIB, 140 * KIB))
WINDOWED = LayerCaches(num_layers=1, plane_token_bytes=4 * KIB, window=32)


def columns(pages):
    return (
        pages.complete_bytes / COLUMN,
        pages.newest_bytes / COLUMN,
        pages.grown_bytes / COLUMN,
        pages.completed_bytes / COLUMN,
        pages.num_pages,
    )


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1, (100, 0, 16, 0, 2)),  # begins a page: there is none to fetch
        (2, (100, 16, 16, 0, 2)),
        (16, (100, 16, 16, 16, 2)),  # fills it, and it goes to disk
        (17, (116, 0, 16, 0, 3)),
        (32, (116, 16, 16, 0, 3)),  # the last page of all stays
    ],
)
def test_the_newest_page_moves_whole_and_rests_when_it_is_full(step, expected):
    assert columns(step_pages(CACHE, 100, step, 32, 16)) == expected


def test_the_last_page_is_as_wide_as_what_is_left_to_decode():
    assert columns(step_pages(CACHE, 100, 17, 20, 16)) == (116, 0, 4, 0, 3)


def test_a_packed_page_replaces_the_exact_one_that_it_is_made_of():
    """A prompt of 100 has a page of 128 columns, two groups."""
    group, exact = 280 * KIB, GROUP_TOKENS * COLUMN

    growing = step_pages(PACKED, 100, 63, 100, 16)
    full = step_pages(PACKED, 100, 64, 100, 16)
    after = step_pages(PACKED, 100, 65, 100, 16)

    assert (growing.complete_bytes, growing.newest_bytes, growing.grown_bytes) == (2 * group, exact, exact)  # fmt: skip
    assert (full.newest_bytes, full.grown_bytes, full.completed_bytes) == (exact, group, group)
    assert (after.complete_bytes, after.newest_bytes) == (3 * group, 0)


def test_a_window_shows_a_step_its_own_pages_only():
    """31 columns of the prompt are kept in pages of 16, the narrow one first."""
    first, later = step_pages(WINDOWED, 100, 1, 64, 16), step_pages(WINDOWED, 100, 40, 64, 16)

    assert columns(first) == (31, 0, 16, 0, 3)
    # Column 70 of those kept sees 39 and later; its page begins at 63, theirs at 31.
    assert columns(later) == (32, 16, 16, 0, 3)


@pytest.mark.parametrize(
    ("begin", "end", "fetched", "written"),
    [
        (0, 600, 0, 600),
        (0, 100, 0, 344),
        (100, 300, 344, 256),  # the page of column 99 goes on to 343
        (344, 600, 344, 256),
        (300, 400, 344, 512),
    ],
)
def test_a_chunk_writes_the_pages_that_it_reaches_and_fetches_those_before(
    begin, end, fetched, written
):
    """A prompt of 600 has pages of 88, 256 and 256 columns."""
    pages = prompt_pages(CACHE, 600, begin, end, 16)

    assert pages.fetched_bytes == fetched * COLUMN
    assert pages.written_bytes == written * COLUMN


def test_what_a_window_keeps_of_a_prompt_moves_with_every_chunk():
    kept = 31 * COLUMN
    assert prompt_pages(WINDOWED, 100, 0, 50, 16).fetched_bytes == 0
    later = prompt_pages(WINDOWED, 100, 50, 100, 16)
    assert later.fetched_bytes == later.written_bytes == kept


def test_packed_prompts_are_written_once_and_not_fetched():
    assert prompt_pages(PACKED, 100, 0, 50, 16).written_bytes == 0
    last = prompt_pages(PACKED, 100, 50, 100, 16)
    assert (last.fetched_bytes, last.written_bytes) == (0, 2 * 280 * KIB)


@given(
    caches=st.sampled_from([CACHE, PACKED, WINDOWED]),
    prompt=st.integers(1, 700),
    last=st.integers(1, 200),
    page_tokens=st.sampled_from([16, 64]),
)
def test_steps_add_up(caches, prompt, last, page_tokens):
    steps = [step_pages(caches, prompt, step, last, page_tokens) for step in range(1, last + 1)]
    mean = mean_step_pages(caches, prompt, last, page_tokens)

    for name in ("complete_bytes", "newest_bytes", "grown_bytes", "completed_bytes", "num_pages"):
        assert getattr(mean, name) * last == pytest.approx(
            sum(getattr(each, name) for each in steps)
        )
    # Every page that a later step attends to as a complete one was completed, or is the prompt's.
    for before, after in pairwise(steps):
        assert after.complete_bytes <= before.complete_bytes + before.completed_bytes
        assert (after.newest_bytes == 0) == (before.completed_bytes > 0)
    assert steps[-1].completed_bytes == 0

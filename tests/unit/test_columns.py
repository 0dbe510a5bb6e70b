"""Columns and pages: what a window keeps, counted column by column."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexport.planner.columns import (
    GROUP_TOKENS,
    edges_of,
    first_seen,
    most_kept,
    page_sizes,
    page_widths,
)

LENGTHS = {
    "prompt": st.integers(1, 700),
    "decoded": st.integers(0, 300),
    "page_tokens": st.integers(1, 300),
    "window": st.none() | st.integers(1, 600),
}


def most(prompt, decoded, page_tokens, window, page_bytes=lambda width: width):
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, window)
    widths = (*of_prompt, *of_decoded)
    return most_kept([page_bytes(width) for width in widths], edges_of(widths), window)


@given(**LENGTHS)
def test_pages_hold_once_every_column_that_a_step_may_see(prompt, decoded, page_tokens, window):
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, window)

    kept = prompt if window is None else min(prompt, window - 1)
    assert (sum(of_prompt), sum(of_decoded)) == (kept, decoded)
    assert all(0 < width <= 256 for width in of_prompt)
    assert all(0 < width <= page_tokens for width in of_decoded)
    # Only the first page of a prompt and the last one of all may be narrower than others.
    assert len(set(of_prompt[1:])) <= 1
    assert len(set(of_decoded[:-1])) <= 1


@given(**LENGTHS)
def test_what_is_kept_is_what_is_seen_and_the_rest_of_its_pages(
    prompt, decoded, page_tokens, window
):
    """Step by step: a new page if there is none for the column, and old ones go when unseen."""
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, window)
    edges = edges_of((*of_prompt, *of_decoded))
    alive = set(range(len(of_prompt)))
    largest = edges[len(of_prompt)]
    for column in range(edges[len(of_prompt)], edges[-1]):
        newest = next(page for page, stop in enumerate(edges[1:]) if column < stop)
        alive.add(newest)
        largest = max(largest, sum(edges[page + 1] - edges[page] for page in alive))

        oldest = 0 if window is None else max(0, column - window + 1)
        assert first_seen(edges, column, window) == min(alive)
        assert edges[min(alive)] <= oldest
        alive = {
            page for page in alive if window is None or edges[page + 1] > column + 1 - window + 1
        }

    assert most(prompt, decoded, page_tokens, window) == largest


@given(**LENGTHS)
def test_a_window_keeps_little_more_than_itself_however_long_the_row_is(
    prompt, decoded, page_tokens, window
):
    kept = most(prompt, decoded, page_tokens, window)

    assert kept <= prompt + decoded
    if window is not None:
        rounding = max(16, window // 8) - 1
        assert kept <= window + 2 * rounding


@given(**LENGTHS, grain=st.integers(1, 40))
def test_longer_rows_never_keep_less(prompt, decoded, page_tokens, window, grain):
    """So that what was planned for the longest row is enough for any other."""

    def kept(prompt, decoded):
        return most(prompt, decoded, page_tokens, window, lambda width: -(-width // grain) * grain)

    assert kept(prompt, decoded) <= kept(prompt + 1, decoded)
    assert kept(prompt, decoded) <= kept(prompt, decoded + 1)


@given(**LENGTHS, data=st.data())
def test_what_is_kept_from_a_page_on_never_grows(prompt, decoded, page_tokens, window, data):
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, window)
    widths = (*of_prompt, *of_decoded)
    num_made = data.draw(st.integers(0, len(widths)))
    edges = edges_of(widths)

    later = most_kept(widths, edges, window, num_made + 1)

    assert later <= most_kept(widths, edges, window, num_made)
    assert num_made < len(widths) or later == 0


# ---- pages of whole groups, packed when they are complete

PACKED_LENGTHS = {name: LENGTHS[name] for name in ("prompt", "decoded", "window")}


def packed_pages(prompt, decoded, window):
    return page_widths(prompt, decoded, 16, window, GROUP_TOKENS)


def packed_most(prompt, decoded, window, packed, num_made=0):
    of_prompt, of_decoded = packed_pages(prompt, decoded, window)
    sizes, beside = page_sizes(of_prompt, of_decoded, lambda width: 10 * width, packed)
    return most_kept(sizes, edges_of((*of_prompt, *of_decoded)), window, num_made, beside)


@given(**PACKED_LENGTHS)
def test_pages_of_groups_hold_whole_ones_from_the_prompts_end_on(prompt, decoded, window):
    of_prompt, of_decoded = packed_pages(prompt, decoded, window)

    kept = prompt if window is None else min(prompt, window - 1)
    assert kept <= sum(of_prompt) < kept + GROUP_TOKENS
    assert all(width % GROUP_TOKENS == 0 and 0 < width <= 256 for width in of_prompt)
    assert len(set(of_prompt[1:])) <= 1
    assert sum(of_decoded) == decoded
    assert set(of_decoded[:-1]) <= {GROUP_TOKENS}
    assert max(of_decoded, default=0) <= GROUP_TOKENS


@given(**PACKED_LENGTHS, packed_share=st.integers(1, 12))
def test_a_page_is_exact_until_it_is_complete_and_both_for_a_moment(
    prompt, decoded, window, packed_share
):
    """Step by step; but for the very last page, which nobody reads when it is complete."""

    def packed(width):
        return packed_share * width

    of_prompt, of_decoded = packed_pages(prompt, decoded, window)
    edges = edges_of((*of_prompt, *of_decoded))
    base = edges[len(of_prompt)]
    alive = {page: packed(width) for page, width in enumerate(of_prompt)}
    largest = sum(alive.values())
    for column in range(base, edges[-1]):
        newest = next(page for page, stop in enumerate(edges[1:]) if column < stop)
        width = edges[newest + 1] - edges[newest]
        alive.setdefault(newest, 10 * width)
        largest = max(largest, sum(alive.values()))
        first = first_seen(edges, column + 1, window) if column + 1 < edges[-1] else 0
        alive = {page: size for page, size in alive.items() if page >= first}
        if column + 1 == edges[newest + 1] < edges[-1] and newest in alive:
            largest = max(largest, sum(alive.values()) + packed(width))
            alive[newest] = packed(width)

    most = packed_most(prompt, decoded, window, packed)

    assert largest <= most
    # Pages may go between the first column of one and its last, which the plan does not count on.
    assert window is not None or largest == most


@given(**PACKED_LENGTHS, grain=st.integers(1, 40))
def test_longer_rows_never_keep_less_when_they_are_packed(prompt, decoded, window, grain):
    def kept(prompt, decoded):
        return packed_most(prompt, decoded, window, lambda width: -(-3 * width // grain) * grain)

    assert kept(prompt, decoded) <= kept(prompt + 1, decoded)
    assert kept(prompt, decoded) <= kept(prompt, decoded + 1)

"""Which columns of a row's cache lie in which page, and which of them a layer keeps.

Columns are counted from the first that is kept, pages from 0; page n holds the columns edges[n] ..
edges[n + 1] - 1. A query sees its own column and, in a layer with a window, the window - 1 before
it. So of a prompt such a layer keeps window - 1 columns, all that the first decode step sees, and
a page whose last column has left the window is gone before the next one is made.

A cache that is packed in groups of columns has pages of whole groups, counted from the prompt's
end in both directions: so they are a row's own, whatever rows share its batch. A prompt's first
group may begin before the prompt does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate

__all__ = [
    "GROUP_TOKENS",
    "SPILL_PAGE_TOKENS",
    "edges_of",
    "first_seen",
    "most_kept",
    "page_sizes",
    "page_widths",
]

PROMPT_PAGE_TOKENS = 256
"""Columns of a page of the prompt: wide enough for attention to run at its full rate, and narrow
enough for a chunk of a long prompt not to move much more than itself."""

SPILL_PAGE_TOKENS = 16
"""Columns of a page when some rows' cache is on disk: their newest page waits in memory. No layer
has narrower ones for its window's sake, since a page is a record on disk and a kernel's call."""

GROUP_TOKENS = 64
"""Columns of a group: neighbours whose keys, of one feature, are packed together. What is decoded
waits for its group to be complete, and its pages are one group wide."""

WINDOW_PAGES = 8
"""Pages that a window is cut into. Its oldest columns wait for their whole page to leave it, so
this is how little more than itself a window takes: an eighth."""


def page_widths(
    prompt: int, decoded: int, page_tokens: int, window: int | None = None, group: int = 1
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Columns of each page of a prompt, as far as it is kept, and of what is decoded after it.

    With a `group` of several columns, pages hold whole ones; but the last of all may be narrower.

    A prompt's first page is the narrow one. So the pages of all prompts end alike, and a longer
    prompt takes no less than a shorter one, whenever pages go.
    """
    most = PROMPT_PAGE_TOKENS
    if window is not None:
        prompt = min(prompt, window - 1)
        narrow = max(SPILL_PAGE_TOKENS, window // WINDOW_PAGES)
        most, page_tokens = min(most, narrow), min(page_tokens, narrow)
    if group > 1:
        prompt = -(-prompt // group) * group
        most, page_tokens = max(group, most // group * group), group
    return _widths(prompt, most)[::-1], _widths(decoded, page_tokens)


def page_sizes(
    of_prompt: Sequence[int],
    of_decoded: Sequence[int],
    exact: Callable[[int], int],
    packed: Callable[[int], int] | None,
) -> tuple[list[int], list[int] | None]:
    """What each page takes for good, and beside that until it is complete; given sizes by width.

    Where pages are packed, a page of decoded tokens is so when it is complete, which the very last
    one never is. The prompt's come packed.
    """
    if packed is None:
        return [exact(width) for width in (*of_prompt, *of_decoded)], None
    *whole, last = of_decoded or (0,)
    sizes = [packed(width) for width in (*of_prompt, *whole)]
    beside = [0 for _ in of_prompt] + [exact(width) for width in whole]
    if last:
        sizes.append(exact(last))
        beside.append(0)
    return sizes, beside


def edges_of(widths: Sequence[int]) -> list[int]:
    """The first column of each page, and the end of the last one."""
    return [0, *accumulate(widths)]


def first_seen(edges: Sequence[int], column: int, window: int | None) -> int:
    """The first page that the query in a column sees; that of later queries is no earlier one."""
    return 0 if window is None else bisect_right(edges, max(0, column - window + 1)) - 1


def most_kept(
    sizes: Sequence[int],
    edges: Sequence[int],
    window: int | None,
    num_made: int = 0,
    beside: Sequence[int] | None = None,
) -> int:
    """The most that pages of these sizes take together, from when page `num_made` is made.

    When a page is made, those that its first column's query does not see have gone. `beside` is
    what each page takes beside its size until it is complete.
    """
    if window is None and beside is None:
        return sum(sizes) if num_made < len(sizes) else 0
    before = [0, *accumulate(sizes)]
    beside = beside or [0] * len(sizes)
    return max(
        (
            before[number + 1] - before[first_seen(edges, edges[number], window)] + beside[number]
            for number in range(num_made, len(sizes))
        ),
        default=0,
    )


def _widths(columns: int, most: int) -> tuple[int, ...]:
    full, rest = divmod(columns, most)
    return (most,) * full + ((rest,) if rest else ())

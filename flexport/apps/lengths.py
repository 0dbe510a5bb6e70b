"""How long the rows of a job are, by a look at some of them, spread evenly over the whole file."""

from __future__ import annotations

import io
from collections.abc import Iterable

from flexport.errors import RowError, UsageError
from flexport.intake.encode import Encoder
from flexport.intake.jsonl import read_rows
from flexport.intake.rows import BadRow
from flexport.records import Request

__all__ = ["evenly", "sampled"]

MOST_ROWS = 1024
"""Lines that are looked at: enough to meet a length that one row in 200 has."""

MOST_BYTES = 1 << 20
"""Of text that is made tokens of: about half a second's work."""


def sampled(lines: Iterable[bytes], encoder: Encoder) -> tuple[list[Request], int]:
    """Some requests of a job, and about how many it has in all.

    Raises UsageError if none of the lines that were looked at can be run.
    """
    kept, num_lines = evenly((line for line in lines if line.strip()), MOST_ROWS)
    while len(kept) > 1 and sum(map(len, kept)) > MOST_BYTES:
        kept = kept[::2]
    requests, problem = [], "it is empty"
    for row in read_rows(io.BytesIO(b"\n".join(line.strip() for line in kept))):
        if isinstance(row, BadRow):
            problem = row.message
            continue
        try:
            requests.append(encoder.encode(row))
        except RowError as error:
            problem = str(error)
    if not requests:
        raise UsageError(f"no row of the input can be run, so there is nothing to plan: {problem}")
    return requests, round(num_lines * len(requests) / len(kept))


def evenly(lines: Iterable[bytes], most: int) -> tuple[list[bytes], int]:
    """At most so many of the lines, the same distance apart, and how many there are."""
    kept: list[bytes] = []
    step, num_lines = 1, 0
    for line in lines:
        if num_lines % step == 0:
            kept.append(line)
        num_lines += 1
        if len(kept) > most:
            kept, step = kept[::2], 2 * step
    return kept, num_lines

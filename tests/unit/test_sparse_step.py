"""What is read from disk so that some lines of values come."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.sparse_step import READ_ACROSS_BYTES, reads_of

GRAIN = 4096


@given(
    line_bytes=st.sampled_from([40, 72, 256, 4096, 16384]),
    lines=st.sets(st.integers(0, 3000), min_size=1, max_size=60),
)
def test_reads_bring_every_line_and_little_else(line_bytes, lines):
    begins = [line * line_bytes for line in sorted(lines)]
    file_B = torch.arange(3001 * line_bytes + GRAIN) % 251

    reads, found_P = reads_of(torch.tensor(begins), line_bytes)

    read_B = torch.cat([file_B[first : first + size] for first, size in reads])
    for begin, found in zip(begins, found_P.tolist(), strict=True):
        assert torch.equal(read_B[found : found + line_bytes], file_B[begin : begin + line_bytes])
    assert all(first % GRAIN == size % GRAIN == 0 for first, size in reads)
    stops = [first + size for first, size in reads]
    between = [reads[at + 1][0] - stops[at] for at in range(len(reads) - 1)]
    assert all(gap >= READ_ACROSS_BYTES for gap in between)
    # Every stretch that is read across lies between two lines.
    grains = {at // GRAIN for begin in begins for at in (begin, begin + line_bytes - 1)}
    assert {first // GRAIN for first, _ in reads} <= grains
    assert {stop // GRAIN - 1 for stop in stops} <= grains
    longest = sum(min(gap, READ_ACROSS_BYTES) for gap in _gaps(begins, line_bytes))
    assert sum(size for _, size in reads) <= sum(_grains(begins, line_bytes)) + longest


def _grains(begins: list[int], line_bytes: int) -> list[int]:
    """Bytes of the grains of each line."""
    return [((begin + line_bytes - 1) // GRAIN - begin // GRAIN + 1) * GRAIN for begin in begins]


def _gaps(begins: list[int], line_bytes: int) -> list[int]:
    stops = [begin + line_bytes for begin in begins]
    return [after - stop for stop, after in zip(stops, begins[1:], strict=False)]

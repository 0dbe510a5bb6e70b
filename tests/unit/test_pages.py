"""Pages: rows of a page can be moved by themselves, and views show the same bytes."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.pages import PageShape
from flexport.planner.footprint import page_widths
from flexport.store.direct_io import ALIGNMENT

SHAPES = st.builds(
    PageShape,
    num_kv_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 4, 64]),
    num_planes=st.sampled_from([1, 2]),
    keys_by_feature=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@given(shape=SHAPES, num_rows=st.integers(1, 5), width=st.integers(1, 40), data=st.data())
def test_rows_of_a_page_moved_by_themselves_are_its_rows(shape, num_rows, width, data):
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    page_B = torch.zeros(shape.page_bytes(num_rows, width), dtype=torch.uint8)
    part_B = torch.zeros(shape.page_bytes(end - begin, width), dtype=torch.uint8)
    for seed, view in enumerate(shape.views(part_B, end - begin, width)):
        torch.manual_seed(seed)
        view.copy_(torch.randn(view.shape))

    at = 0
    for first, num_bytes in shape.row_ranges(begin, end, num_rows, width):
        assert first % ALIGNMENT == num_bytes % ALIGNMENT == 0
        page_B[first : first + num_bytes] = part_B[at : at + num_bytes]
        at += num_bytes

    assert at == len(part_B)
    views = zip(
        shape.views(page_B, num_rows, width), shape.views(part_B, end - begin, width), strict=True
    )
    for whole, part in views:
        assert torch.equal(whole[begin:end], part)
        assert not whole[:begin].any()
        assert not whole[end:].any()


@given(prompt=st.integers(1, 3000), decoded=st.integers(0, 300), page_tokens=st.integers(1, 64))
def test_pages_hold_every_column_once_and_are_no_wider_than_they_may_be(
    prompt, decoded, page_tokens
):
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens)

    assert (sum(of_prompt), sum(of_decoded)) == (prompt, decoded)
    assert max(of_prompt) <= 256
    assert all(0 < width <= page_tokens for width in of_decoded)

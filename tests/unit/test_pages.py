"""Pages: rows of a page can be moved by themselves, and views show the same bytes."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.pages import PageShape
from flexport.planner.footprint import LayerCaches
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


@given(
    shape=SHAPES,
    prompt=st.integers(1, 600),
    decoded=st.integers(0, 300),
    page_tokens=st.integers(1, 64),
    window=st.none() | st.integers(1, 400),
)
def test_a_row_takes_what_the_planner_counts_for_it(shape, prompt, decoded, page_tokens, window):
    shape = replace(shape, window=window)
    plane_token_bytes = shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize
    counted = LayerCaches(
        num_layers=1,
        plane_token_bytes=plane_token_bytes,
        num_planes=shape.num_planes,
        window=window,
    )

    row_bytes = shape.row_bytes(prompt, decoded, page_tokens)

    assert row_bytes == counted.row_bytes(prompt, decoded, page_tokens)

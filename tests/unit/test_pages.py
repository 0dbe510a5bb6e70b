"""Pages: rows of a page can be moved by themselves, and views show the same bytes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_reference import rounded_keys, rounded_values

from flexport.codecs import cache_groups
from flexport.codecs.plane import Plane
from flexport.engine.packed_pages import PackedShape, pack, pack_prompt_page, unpack
from flexport.engine.pages import PageShape
from flexport.planner.columns import GROUP_TOKENS
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


# ---- packed pages


def packed_shape(shape: PageShape, bits: int) -> PackedShape:
    both: tuple[Literal["tokens", "features"], ...] = ("tokens", "features")
    planes = [
        Plane(num_heads=shape.num_kv_heads, head_dim=shape.head_dim, bits=bits, along=along)
        for along in both[-shape.num_planes :]
    ]
    return PackedShape(planes=tuple(planes))


PACKED = {
    "shape": SHAPES,
    "bits": st.sampled_from([4, 8]),
    "num_groups": st.integers(1, 3),
}


def exact_page(shape: PageShape, num_rows: int, width: int) -> tuple[torch.Tensor, ...]:
    page_B = torch.zeros(shape.page_bytes(num_rows, width), dtype=torch.uint8)
    views = shape.views(page_B, num_rows, width)
    for seed, view in enumerate(views[: shape.num_planes]):
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(seed)))
    return views


@given(**PACKED, num_rows=st.integers(1, 5), data=st.data())
def test_rows_packed_and_moved_by_themselves_are_those_of_the_whole_page(
    shape, bits, num_groups, num_rows, data
):
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    width, packed = num_groups * GROUP_TOKENS, packed_shape(shape, bits)
    exact = exact_page(shape, num_rows, width)
    whole_B = torch.zeros(packed.page_bytes(num_rows, width), dtype=torch.uint8)
    part_B = torch.zeros(packed.page_bytes(end - begin, width), dtype=torch.uint8)

    pack(packed, exact, packed.views(whole_B, num_rows, width))
    pack(packed, [plane[begin:end] for plane in exact], packed.views(part_B, end - begin, width))

    at = 0
    for first, num_bytes in packed.row_ranges(begin, end, num_rows, width):
        assert first % ALIGNMENT == num_bytes % ALIGNMENT == 0
        assert torch.equal(whole_B[first : first + num_bytes], part_B[at : at + num_bytes])
        at += num_bytes
    assert at == len(part_B)


@given(**PACKED)
def test_what_is_unpacked_does_not_depend_on_how_keys_lie(shape, bits, num_groups):
    width, packed = num_groups * GROUP_TOKENS, packed_shape(shape, bits)
    exact = exact_page(shape, 2, width)
    packed_B = torch.zeros(packed.page_bytes(2, width), dtype=torch.uint8)
    planes = packed.views(packed_B, 2, width)
    pack(packed, exact, planes)

    found = []
    for by_feature in (False, True):
        laid = replace(shape, keys_by_feature=by_feature and shape.num_planes > 1)
        views = exact_page(laid, 2, width)
        unpack(packed, planes, views)
        found.append(views)

    assert all(torch.equal(*views) for views in zip(*found, strict=True))
    error = max((a - b).abs().max().item() for a, b in zip(found[0], exact, strict=True))
    assert error < (0.35 if bits == 4 else 0.05)


@given(**PACKED, length=st.integers(1, 150), missing=st.integers(0, 200))
def test_what_comes_before_a_rows_first_token_changes_nothing_of_it(
    shape, bits, num_groups, length, missing
):
    """A page that begins `missing` columns before the row; its last ones may be missing, too."""
    width, packed = num_groups * GROUP_TOKENS, packed_shape(shape, bits)
    length = max(length, width - missing)
    exact = exact_page(shape, 1, length)
    for plane in exact[: shape.num_planes]:
        plane += 5.0  # so that a 0 between them would show
    packed_B = torch.full((packed.page_bytes(1, width),), 0xFF, dtype=torch.uint8)
    planes = packed.views(packed_B, 1, width)

    pack_prompt_page(packed, exact, planes, -missing, width)
    views = exact_page(shape, 1, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_groups, "_HAS_TABLES", False)  # which rounds 8 bits less
        unpack(packed, planes, views)

    assert all(torch.isfinite(view).all() for view in views)
    seen = width - missing
    if seen <= 0:
        return
    for way, view, own in zip(packed.planes, views, exact, strict=False):
        # Each group's own tokens alone, packed as values of one line.
        tokens = own[0, :, :seen].float()
        if way.along == "features":
            expected = rounded_values(tokens, bits)
        else:
            expected = rounded_keys(tokens, bits)
        assert torch.equal(view[0, :, -seen:], expected.to(view.dtype))


@given(
    shape=SHAPES,
    prompt=st.integers(1, 600),
    decoded=st.integers(0, 300),
    window=st.none() | st.integers(1, 400),
    bits=st.sampled_from([4, 8]),
)
def test_a_packed_row_takes_what_the_planner_counts_for_it(shape, prompt, decoded, window, bits):
    packed = packed_shape(shape, bits)
    shape = replace(shape, window=window, packed=packed)
    counted = LayerCaches(
        num_layers=1,
        plane_token_bytes=shape.num_kv_heads * shape.head_dim * shape.dtype.itemsize,
        num_planes=shape.num_planes,
        window=window,
        packings=(("codec", tuple(plane.num_bytes(GROUP_TOKENS) for plane in packed.planes)),),
    ).kept_in("codec")

    assert shape.row_bytes(prompt, decoded, 16) == counted.row_bytes(prompt, decoded, 16)
    assert counted.spilled_row_bytes(prompt, decoded, 16) <= counted.row_bytes(prompt, decoded, 16)

"""The packed forms that flexport makes: what is announced is made, and means what is described.

The references read the bytes value by value, by what `flexport.backend.PackedMatrix` says.

Dimension key: R rows, D features, B tiles, C bytes of a feature in a tile (32), I rows of a tile
(64), G groups of a row.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexport.codecs.compressed import Compressed, Int4Tiles, Int8Rows, compressed
from flexport.policy import WEIGHT_CODECS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

FORMS: list[Compressed] = [
    form for form in (compressed(codec) for codec in dict.fromkeys(WEIGHT_CODECS)) if form
]

each_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.key)

any_form = st.sampled_from(FORMS)

any_shape = st.tuples(st.integers(1, 200), st.integers(1, 300))


def drawn(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights, rows of which differ in size and lean to one side."""
    draw = torch.Generator().manual_seed(seed)
    normal_RD = torch.randn(shape, generator=draw)
    return (normal_RD * torch.rand(shape[0], 1, generator=draw) + 0.3).to(dtype)


def decoded(
    form: Compressed,
    parts: tuple[Tensor, ...],
    shape: tuple[int, int],
    dtype: torch.dtype = torch.float32,
    begin: int = 0,
) -> Tensor:
    """In memory that held NaN, so that what is not written is seen."""
    return form.decode(parts, torch.full(shape, torch.nan, dtype=dtype), begin)


def described(form: Compressed, parts: tuple[Tensor, ...], row: int, feature: int) -> float:
    """One value, in Python's arithmetic."""
    codes, scales = parts
    if isinstance(form, Int8Rows):
        return int(codes[row, feature]) * float(scales[row])
    assert isinstance(form, Int4Tiles)
    tile, place = divmod(row, 64)
    byte = int(codes[tile, feature, place % 32])
    code = byte >> 4 if place >= 32 else byte & 15
    scale, zero = scales[tile, feature // form.group, place].tolist()
    return (code - 8) * float(scale) + float(zero)


def parts_size(form: Compressed, parts: tuple[Tensor, ...], row: int, feature: int) -> float:
    """The largest number on the way to a value, which a narrow dtype rounds."""
    value = abs(described(form, parts, row, feature))
    if isinstance(form, Int8Rows):
        return value
    assert isinstance(form, Int4Tiles)
    zero = abs(float(parts[1][row // 64, feature // form.group, row % 64, 1]))
    return max(value, value + 2 * zero)


# what is announced


@given(form=any_form, shape=any_shape)
def test_parts_are_what_the_layout_announces(form: Compressed, shape: tuple[int, int]) -> None:
    layout = form.layout("w", shape)

    parts = form.encode(drawn(shape))

    assert layout.shape == shape
    assert [tuple(part.shape) for part in parts] == [part.shape for part in layout.parts]
    assert [frozenset({str(part.dtype).removeprefix("torch.")}) for part in parts] == [
        part.dtypes for part in layout.parts
    ]
    assert sum(part.nbytes for part in parts) == layout.num_bytes
    assert all(part.is_contiguous() for part in parts)


@each_form
def test_a_backend_is_given_the_parts_as_they_are(form: Compressed) -> None:
    parts = form.encode(drawn((70, 130)))

    matrix = form.matrix(parts, (70, 130))

    assert matrix.shape == (70, 130)
    assert all(mine is given for mine, given in zip(matrix.parts, parts, strict=True))
    assert (matrix.form, matrix.group) == (
        ("int4", form.group) if isinstance(form, Int4Tiles) else ("int8", 0)
    )


def test_int4_at_whole_tiles_and_groups_takes_four_and_a_half_bits_a_weight() -> None:
    for shape in ((64, 64), (192, 320), (4096, 11008)):
        bits = 8 * Int4Tiles().layout("w", shape).num_bytes / math.prod(shape)

        assert bits == 4.5


@given(shape=any_shape)
def test_int8_takes_eight_bits_a_weight_and_a_scale_a_row(shape: tuple[int, int]) -> None:
    bits = 8 * Int8Rows().layout("w", shape).num_bytes / math.prod(shape)

    assert bits == pytest.approx(8 + 32 / shape[1])


@given(form=any_form, shape=any_shape)
def test_a_matrix_that_fits_is_much_smaller_than_in_bfloat16(
    form: Compressed, shape: tuple[int, int]
) -> None:
    most = 8.5 if isinstance(form, Int8Rows) else 0.25 + 1.25 * 5
    if form.fits(shape):
        assert 8 * form.layout("w", shape).num_bytes / math.prod(shape) <= most


@pytest.mark.parametrize(
    ("form", "shape", "fits"),
    [
        (Int8Rows(), (1, 64), True),
        (Int8Rows(), (4096, 63), False),
        (Int4Tiles(), (64, 64), True),
        (Int4Tiles(), (4096, 63), False),
        (Int4Tiles(group=32), (4096, 63), True),
        (Int4Tiles(group=128), (4096, 127), False),
        (Int4Tiles(), (51, 4096), False),
        (Int4Tiles(), (52, 4096), True),
        (Int4Tiles(), (65, 4096), False),
        (Int4Tiles(), (257, 4096), True),
    ],
)
def test_what_would_be_padding_and_scales_for_the_most_part_does_not_fit(
    form: Compressed, shape: tuple[int, int], fits: bool
) -> None:
    assert form.fits(shape) is fits


def test_forms_whose_bytes_differ_have_keys_that_differ() -> None:
    assert len({form.key for form in FORMS}) == len(set(FORMS)) > 1
    assert compressed("none") is None
    assert compressed("int4") == compressed("int4:64")


# what it means


@given(form=any_form, shape=any_shape, seed=st.integers(0, 99), data=st.data())
def test_each_value_is_what_the_description_says(
    form: Compressed, shape: tuple[int, int], seed: int, data: st.DataObject
) -> None:
    parts = form.encode(drawn(shape, seed))

    out_RD = decoded(form, parts, shape)

    rows, features = (
        data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=9)) for size in shape
    )
    for row in {0, shape[0] - 1, *rows}:
        for feature in {0, shape[1] - 1, *features}:
            exact = described(form, parts, row, feature)
            # Products with four bits are exact in float32, so there is one rounding either way.
            assert float(out_RD[row, feature]) == float(torch.tensor(exact, dtype=torch.float32))


@each_form
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_each_value_is_rounded_at_every_step_in_a_narrow_dtype(
    form: Compressed, dtype: torch.dtype
) -> None:
    """At most three: the scale (that of int8 is float32), the product, and the sum with the zero."""
    shape = (70, 300)
    parts = form.encode(drawn(shape, dtype=dtype))

    out_RD = decoded(form, parts, shape, dtype)

    assert out_RD.dtype is dtype
    unit = torch.finfo(dtype).eps / 2
    for row in range(0, 70, 3):
        for feature in range(0, 300, 7):
            exact = described(form, parts, row, feature)
            bound = 3.03 * unit * parts_size(form, parts, row, feature)
            assert abs(float(out_RD[row, feature]) - exact) <= bound + 1e-6


@given(form=any_form, shape=any_shape, dtype=st.sampled_from(DTYPES))
def test_weights_come_back_within_half_a_step(
    form: Compressed, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of a row or group from its least value to its greatest; a little more, since scales and zeros
    are rounded to bfloat16, and since less is lost on the whole where the ends are cut off."""
    values_RD = drawn(shape, dtype=dtype).float()

    out_RD = decoded(form, form.encode(values_RD.to(dtype)), shape)

    if isinstance(form, Int8Rows):
        steps_R1 = values_RD.abs().amax(1, keepdim=True) / 127
        assert bool(((out_RD - values_RD).abs() <= 0.51 * steps_R1).all())
        return
    assert isinstance(form, Int4Tiles)
    for group_RG in zip(values_RD.split(form.group, 1), out_RD.split(form.group, 1), strict=True):
        before_RG, after_RG = group_RG
        low_R1, high_R1 = before_RG.aminmax(dim=1, keepdim=True)
        steps_R1 = (high_R1 - low_R1) / 15 + 2**-8 * torch.maximum(low_R1.abs(), high_R1.abs())
        assert bool(((after_RG - before_RG).abs() <= 1.5 * steps_R1).all())


# rows


@given(form=any_form, shape=any_shape, dtype=st.sampled_from(DTYPES), data=st.data())
def test_any_range_of_whole_cuts_decodes_as_in_the_whole(
    form: Compressed, shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    layout, parts = form.layout("w", shape), form.encode(drawn(shape))
    whole_RD = decoded(form, parts, shape, dtype)
    num_cuts = -(-shape[0] // layout.rows_per_cut)
    first = data.draw(st.integers(0, num_cuts - 1))
    last = data.draw(st.integers(first + 1, num_cuts))
    begin, end = first * layout.rows_per_cut, min(last * layout.rows_per_cut, shape[0])
    some = [part.lines(begin, end) for part in layout.parts]

    own = tuple(part[slice(*lines)] for part, lines in zip(parts, some, strict=True))
    out_RD = decoded(form, own, (end - begin, shape[1]), dtype, begin)

    assert torch.equal(out_RD, whole_RD[begin:end])


@given(form=any_form, shape=any_shape, data=st.data())
def test_any_range_of_whole_cuts_is_encoded_as_in_the_whole(
    form: Compressed, shape: tuple[int, int], data: st.DataObject
) -> None:
    layout, values_RD = form.layout("w", shape), drawn(shape)
    parts = form.encode(values_RD)
    num_cuts = -(-shape[0] // layout.rows_per_cut)
    first = data.draw(st.integers(0, num_cuts - 1))
    last = data.draw(st.integers(first + 1, num_cuts))
    begin, end = first * layout.rows_per_cut, min(last * layout.rows_per_cut, shape[0])

    own = form.encode(values_RD[begin:end])

    for mine, part, announced in zip(own, parts, layout.parts, strict=True):
        assert torch.equal(mine, part[slice(*announced.lines(begin, end))])


@given(form=st.sampled_from([f for f in FORMS if isinstance(f, Int4Tiles)]), shape=any_shape)
def test_rows_that_pad_the_last_tile_belong_to_nothing(
    form: Int4Tiles, shape: tuple[int, int]
) -> None:
    codes_BDC, scales_BGI2 = parts = form.encode(drawn(shape))
    before_RD = decoded(form, parts, shape).clone()

    for row in range(shape[0], len(codes_BDC) * 64):
        tile, place = divmod(row, 64)
        codes_BDC[tile, :, place % 32] ^= 0xF0 if place >= 32 else 0x0F
        scales_BGI2[tile, :, place] = math.nan

    assert torch.equal(decoded(form, parts, shape), before_RD)


# what can not be packed


@each_form
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(form: Compressed, bad: float) -> None:
    for row, feature in ((0, 0), (66, 299), (69, 129)):
        values_RD = drawn((70, 300))
        values_RD[row, feature] = bad

        with pytest.raises(ValueError, match="finite"):
            form.encode(values_RD)


@each_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_value_come_back(form: Compressed, dtype: torch.dtype) -> None:
    values_RD = torch.tensor([0.0, -0.75, 1.5], dtype=dtype)[:, None].expand(3, 70).contiguous()

    out_RD = decoded(form, form.encode(values_RD), (3, 70), dtype)

    assert torch.allclose(out_RD.float(), values_RD.float(), rtol=2 * torch.finfo(dtype).eps)


@each_form
def test_what_is_encoded_may_have_any_strides(form: Compressed) -> None:
    values_RD = drawn((70, 130))
    wide = drawn((140, 150))
    wide[::2, 7:137] = values_RD

    for view in (values_RD.T.contiguous().T, wide[::2, 7:137]):
        for mine, part in zip(form.encode(view), form.encode(values_RD), strict=True):
            assert torch.equal(mine.view(torch.uint8), part.view(torch.uint8))

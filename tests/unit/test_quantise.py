"""Quantised weights are near to what they were, nearer than from least to greatest, in any company.

The references are written from the definition, in float64.

Dimension key: R rows, D features, P groups a row, N groups, G values a group.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexport.codecs import quantise
from flexport.codecs.quantise import (
    Method,
    Quantised,
    dequantise_groups,
    dequantise_rows,
    quantise_groups,
    quantise_rows,
)

METHODS: list[Method] = ["refined", "min-max"]
KINDS = ["gauss", "laplace", "student"]
LARGEST = torch.finfo(torch.bfloat16).max
TINY = torch.finfo(torch.bfloat16).tiny


def draw(kind: str, num_rows: int, size: int, *, seed: int = 0) -> Tensor:
    """Weights of about the size that a model's have."""
    shape = (num_rows, size)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    if kind == "laplace":
        # A normal number of exponentially distributed variance.
        normal *= torch.empty(shape).exponential_(generator=generator).mul_(2).sqrt_()
    if kind == "student":
        squares = torch.randn((4, *shape), generator=generator).square().mean(0)
        normal /= squares.sqrt()
    if kind == "one-sided":
        normal *= normal
    return normal * 0.02


def groups_of(matrix_RD: Tensor, group: int) -> list[Tensor]:
    """Each row's groups, shorter ones at the end of a row included."""
    return [some for row in matrix_RD for some in row.split(group)]


def decoded(quantised: Quantised, dtype: torch.dtype = torch.float32) -> Tensor:
    return dequantise_groups(quantised, torch.empty(quantised.codes_RD.shape, dtype=dtype))


def errors(values_RD: Tensor, quantised: Quantised) -> Tensor:
    """The squared error of each group."""
    off_RD = values_RD.double() - decoded(quantised).double()
    return torch.stack([off.square().sum() for off in groups_of(off_RD, quantised.group)])


def same(one: Quantised, other: Quantised) -> bool:
    names = ("codes_RD", "scales_RP", "zeros_RP")
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def rows_of(whole: Quantised, begin: int, end: int) -> Quantised:
    return Quantised(
        codes_RD=whole.codes_RD[begin:end],
        scales_RP=whole.scales_RP[begin:end],
        zeros_RP=whole.zeros_RP[begin:end],
        bits=whole.bits,
        group=whole.group,
    )


@pytest.fixture
def few_at_once(monkeypatch):
    """So few weights are worked on in one go that small matrices take several."""
    monkeypatch.setattr(quantise, "_AT_ONCE", 500)


@given(
    bits=st.integers(2, 8),
    group=st.sampled_from([2, 3, 16, 64, 100]),
    size=st.integers(1, 200),
    method=st.sampled_from(METHODS),
    seed=st.integers(0, 1000),
)
def test_a_value_is_zero_plus_its_code_less_the_middle_times_scale(bits, group, size, method, seed):
    values_RD = draw("gauss", 3, size, seed=seed)

    made = quantise_groups(values_RD, bits=bits, group=group, method=method)
    out_RD = decoded(made)

    assert made.codes_RD.dtype == torch.uint8
    assert int(made.codes_RD.max()) < 2**bits
    assert made.scales_RP.dtype == made.zeros_RP.dtype == torch.bfloat16
    for row, column in itertools.product(range(3), range(0, size, 7)):
        scale = made.scales_RP[row, column // group].float()
        zero = made.zeros_RP[row, column // group].float()
        code = made.codes_RD[row, column].float()
        assert out_RD[row, column] == (code - 2 ** (bits - 1)) * scale + zero


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_each_code_is_the_nearest_there_is_given_the_rounded_scale_and_zero(bits, method):
    values_RD = draw("student", 8, 150)

    made = quantise_groups(values_RD, bits=bits, group=64, method=method)

    codes = torch.arange(2**bits, dtype=torch.float64) - 2 ** (bits - 1)
    for row, column in itertools.product(range(8), range(150)):
        scale, zero = made.scales_RP[row, column // 64], made.zeros_RP[row, column // 64]
        off = (zero.double() + codes * scale.double() - values_RD[row, column].double()).abs()
        least = off.min()
        assert off[int(made.codes_RD[row, column])] <= least + 1e-6 * scale.double()


@pytest.mark.parametrize("kind", [*KINDS, "one-sided"])
def test_a_refined_matrix_has_a_sixth_less_error_than_one_from_least_to_greatest(kind):
    values_RD = draw(kind, 64, 1024)

    refined = errors(values_RD, quantise_groups(values_RD, bits=4))
    plain = errors(values_RD, quantise_groups(values_RD, bits=4, method="min-max"))

    assert refined.sum() < plain.sum() * 5 / 6


@given(
    kind=st.sampled_from(KINDS),
    bits=st.integers(2, 8),
    group=st.sampled_from([2, 5, 32, 64, 200]),
    size=st.integers(1, 300),
    power=st.integers(-30, 30),
    offset=st.sampled_from([0.0, 0.0, 0.01, 1.0, -40.0]),
    outlier=st.sampled_from([1.0, 10.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_no_group_is_worse_than_from_least_to_greatest(
    kind, bits, group, size, power, offset, outlier, seed
):
    values_RD = draw(kind, 4, size, seed=seed)
    values_RD[:, size // 2] *= outlier
    values_RD = (values_RD + offset) * 10.0**power

    refined = errors(values_RD, quantise_groups(values_RD, bits=bits, group=group))
    plain = errors(values_RD, quantise_groups(values_RD, bits=bits, group=group, method="min-max"))

    # They were compared in float32.
    assert (refined <= plain * (1 + 1e-5) + 1e-30 * values_RD.square().max()).all()


@pytest.mark.parametrize("kind", KINDS)
def test_refined_is_within_three_per_cent_of_an_exhaustive_search(kind):
    values_NG = draw(kind, 60, 64)

    found = errors(values_NG, quantise_groups(values_NG, bits=4))

    assert found.sum() < exhaustive(values_NG, bits=4).sum() * 1.03


def exhaustive(values_NG: Tensor, *, bits: int) -> Tensor:
    """The least squared error of each group over all bfloat16 scales and 32 zeros a step."""
    middle, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    errors = []
    for values_G in values_NG:
        low, high = values_G.min(), values_G.max()
        full = (high - low) / (middle + top)
        around = torch.linspace(0.7, 1.1, 400) * full
        least = torch.tensor(torch.inf)
        for scale in around.bfloat16().unique().float():
            # From where the grid hangs over on one side to where it does on the other.
            ends = torch.stack([low + middle * scale, high - top * scale])
            begin, end = ends.min() - scale / 2, ends.max() + scale / 2
            zeros_C1 = torch.arange(begin, end, scale / 32).bfloat16().float()[:, None]
            codes_CG = ((values_G - zeros_C1) / scale).round().clamp(-middle, top)
            off_CG = zeros_C1 + codes_CG * scale - values_G
            least = torch.minimum(least, off_CG.square().sum(1).min())
        errors.append(least)
    return torch.stack(errors)


def test_flexgens_own_rounding_has_the_error_of_ours_from_least_to_greatest():
    """Its least value and scale are float16, as many bits as a bfloat16 has."""
    values_RD = draw("gauss", 64, 1024)
    values_NG = values_RD.view(-1, 64)
    low_N1 = values_NG.amin(1, keepdim=True).half().float()
    scale_N1 = ((values_NG.amax(1, keepdim=True) - low_N1) / 15).half().float()
    codes_NG = ((values_NG - low_N1) / scale_N1).round().clamp(0, 15)
    theirs = (low_N1 + codes_NG * scale_N1 - values_NG).square().sum().item()

    ours = errors(values_RD, quantise_groups(values_RD, bits=4, method="min-max")).sum().item()

    assert ours == pytest.approx(theirs, rel=0.01)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_rows_by_themselves_give_the_bits_they_give_in_the_whole(method, threads):
    # The whole is long enough for torch to share it among threads, and the shortest part isn't.
    values_RD = draw("student", 12, 8200)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        whole = quantise_groups(values_RD, bits=4, method=method)
        codes_RD, scales_R = quantise_rows(values_RD)
        for begin, end in ((0, 1), (1, 3), (3, 10), (10, 12)):
            part = quantise_groups(values_RD[begin:end], bits=4, method=method)
            assert same(part, rows_of(whole, begin, end))
            assert torch.equal(decoded(part), decoded(whole)[begin:end])
            some_codes_RD, some_scales_R = quantise_rows(values_RD[begin:end])
            assert torch.equal(some_codes_RD, codes_RD[begin:end])
            assert torch.equal(some_scales_R, scales_R[begin:end])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
def test_how_much_is_worked_on_in_one_go_changes_nothing(method, few_at_once, monkeypatch):
    values_RD = draw("laplace", 20, 150)

    in_goes = quantise_groups(values_RD, bits=4, method=method)
    rows_in_goes = quantise_rows(values_RD)
    decoded_in_goes = decoded(in_goes)
    monkeypatch.undo()

    at_once = quantise_groups(values_RD, bits=4, method=method)
    assert same(in_goes, at_once)
    assert torch.equal(decoded_in_goes, decoded(at_once))
    assert all(map(torch.equal, rows_in_goes, quantise_rows(values_RD)))


@pytest.mark.parametrize("method", METHODS)
def test_the_last_group_of_a_row_is_as_if_it_were_alone(method):
    values_RD = draw("gauss", 5, 150)

    whole = quantise_groups(values_RD, bits=4, group=64, method=method)
    last = quantise_groups(values_RD[:, 128:], bits=4, group=64, method=method)

    assert torch.equal(whole.codes_RD[:, 128:], last.codes_RD)
    assert torch.equal(whole.scales_RP[:, 2:], last.scales_RP)
    assert torch.equal(whole.zeros_RP[:, 2:], last.zeros_RP)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_comes_in_is_worked_on_in_float32(dtype):
    values_RD = draw("gauss", 8, 150).to(dtype)

    assert same(quantise_groups(values_RD, bits=4), quantise_groups(values_RD.float(), bits=4))
    assert all(map(torch.equal, quantise_rows(values_RD), quantise_rows(values_RD.float())))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_goes_out_is_rounded_once(dtype):
    made = quantise_groups(draw("gauss", 8, 150), bits=4)
    codes_RD, scales_R = quantise_rows(draw("gauss", 8, 150))
    out_RD = torch.empty(8, 150)

    assert torch.equal(decoded(made, dtype), decoded(made).to(dtype))
    assert torch.equal(
        dequantise_rows(codes_RD, scales_R, out_RD.to(dtype)),
        dequantise_rows(codes_RD, scales_R, out_RD).to(dtype),
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_matrix_need_not_lie_in_one_piece(method):
    wide_RD = draw("gauss", 8, 300)
    values_RD = wide_RD[::2, 10:160]

    made = quantise_groups(values_RD, bits=4, method=method)
    dequantise_groups(made, wide_RD[1::2, 10:160])

    assert same(made, quantise_groups(values_RD.contiguous(), bits=4, method=method))
    assert torch.equal(wide_RD[1::2, 10:160], decoded(made))
    turned_RD = values_RD.t().contiguous().t()
    assert same(made, quantise_groups(turned_RD, bits=4, method=method))
    # Whoever packs codes may count on their order in memory.
    assert quantise_groups(turned_RD, bits=4, method=method).codes_RD.is_contiguous()
    assert quantise_rows(turned_RD)[0].is_contiguous()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -0.3125, 240.0, 1e38, TINY, 1e-40])
def test_a_group_of_one_bfloat16_is_exact(value, method):
    values_RD = torch.full((2, 100), value).bfloat16()

    for bits in (2, 4, 8):
        made = quantise_groups(values_RD, bits=bits, method=method)
        assert torch.equal(decoded(made), values_RD.float())


@pytest.mark.parametrize("method", METHODS)
@given(value=st.floats(-1000, 1000, width=32).filter(lambda value: abs(value) > 1e-30))
def test_a_group_of_one_float32_is_as_near_as_a_bfloat16_and_a_bfloat16_step_come(value, method):
    values_RD = torch.full((1, 64), value)

    made = quantise_groups(values_RD, bits=4, method=method)

    # A bfloat16 has 8 bits: the zero is off by 2 ** -8 of the value, and the scale by 2 ** -8 of that.
    off = (decoded(made) - values_RD).abs().max().item()
    assert off <= abs(value) * 2.0**-16


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "ends",
    [
        (0.0, 0.0),
        (-0.0, 0.0),
        (0.0, 1e-45),
        (-1e-40, 1e-40),
        (0.0, TINY),
        (1e-38, 1e-36),
        (-1e-20, 1e-20),
        (1e19, 1e20),
        (0.0, LARGEST),
        (-LARGEST, 0.0),
        (-LARGEST, LARGEST),
        (LARGEST / 2, LARGEST),
        (-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max),
        (torch.finfo(torch.float32).max, torch.finfo(torch.float32).max),
    ],
)
def test_the_least_and_the_greatest_numbers_decode_to_numbers_near_them(ends, method):
    low, high = ends
    places_RD = torch.linspace(0, 1, 70).repeat(2, 1)
    values_RD = low * (1 - places_RD) + high * places_RD

    for bits in (2, 4, 8):
        made = quantise_groups(values_RD, bits=bits, method=method)
        out_RD = decoded(made)
        assert out_RD.isfinite().all()
        # So that nobody who reads them divides by 0.
        assert (made.scales_RP >= TINY).all()
        step = (high / 2 - low / 2) / (2**bits - 1)
        # Half a step; the ends of a range that is hardly a number's are off by 1 % of it.
        allowed = step * 1.05 + max(abs(low), abs(high)) * 0.02 + TINY
        assert (out_RD.double() - values_RD.double()).abs().max() <= allowed

    codes_RD, scales_R = quantise_rows(values_RD)
    out_RD = dequantise_rows(codes_RD, scales_R, torch.empty_like(values_RD))
    assert out_RD.isfinite().all()
    allowed = max(abs(low), abs(high)) / 127 * 0.501 + TINY
    assert (out_RD.double() - values_RD.double()).abs().max() <= allowed


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_weights_times_a_power_of_two_have_the_same_codes(power):
    values_RD = draw("student", 8, 150)

    one = quantise_groups(values_RD, bits=4)
    other = quantise_groups(values_RD * 2.0**power, bits=4)

    assert torch.equal(one.codes_RD, other.codes_RD)
    assert torch.equal(one.scales_RP * 2.0**power, other.scales_RP)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("column", [0, 64, 149])
def test_a_weight_that_is_no_finite_number_is_refused_by_its_row(bad, column, few_at_once):
    values_RD = draw("gauss", 20, 150)
    values_RD[13, column] = bad

    with pytest.raises(ValueError, match=r"finite.*row 13 "):
        quantise_groups(values_RD, bits=4)
    with pytest.raises(ValueError, match=r"finite.*row 13 "):
        quantise_rows(values_RD)


def test_bits_groups_and_dtypes_that_cannot_be_are_refused():
    values_RD = draw("gauss", 2, 64)

    for bits in (0, 1, 9):
        with pytest.raises(ValueError, match=f"2 to 8 bits, not to {bits}"):
            quantise_groups(values_RD, bits=bits)
    for group in (0, 1, 2048):
        with pytest.raises(ValueError, match=f"2 to 1024 weights, not {group}"):
            quantise_groups(values_RD, bits=4, group=group)
    for call in (lambda ints: quantise_groups(ints, bits=4), quantise_rows):
        with pytest.raises(ValueError, match=r"only float weights.*torch\.int64"):
            call(values_RD.long())


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0), (1, 1)])
def test_a_matrix_may_be_empty(shape):
    values_RD = torch.ones(shape)

    assert torch.equal(decoded(quantise_groups(values_RD, bits=4)), values_RD)
    codes_RD, scales_R = quantise_rows(values_RD)
    assert torch.equal(dequantise_rows(codes_RD, scales_R, torch.empty(shape)), values_RD)


@given(
    kind=st.sampled_from(KINDS),
    num_rows=st.integers(1, 5),
    size=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_no_value_of_a_row_is_off_by_more_than_half_a_step(kind, num_rows, size, seed):
    values_RD = draw(kind, num_rows, size, seed=seed)

    codes_RD, scales_R = quantise_rows(values_RD)
    out_RD = dequantise_rows(codes_RD, scales_R, torch.empty(num_rows, size))

    assert codes_RD.dtype == torch.int8
    assert scales_R.dtype == torch.float32
    assert int(codes_RD.min()) >= -127
    assert torch.equal(scales_R, values_RD.abs().amax(1) / 127)
    assert ((out_RD - values_RD).abs() <= scales_R[:, None] * 0.50001).all()


def test_work_takes_a_few_buffers_of_a_fixed_size():
    """However many rows there are, no tensor is made that grows with them but for the result."""
    values_RD = draw("gauss", 1, 64).expand(40_000, 64).bfloat16()
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype == torch.float32:
                seen.append(out.untyped_storage().nbytes())
            return out

    with Spy():
        quantise_groups(values_RD, bits=4)
        quantise_rows(values_RD)

    # As float32 the matrix takes 10 MB.
    assert max(seen) < 8e6

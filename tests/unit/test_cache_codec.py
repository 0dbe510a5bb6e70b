"""Groups in 8 or 4 bits: what comes back, how it lies, and what it takes."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packed_reference import rounded
from torch import Tensor

from flexport.codecs import cache_groups as groups_module
from flexport.codecs.cache_groups import decode, encode
from flexport.codecs.plane import BITS, GROUP_VALUES, Groups, Plane

GROUPS = st.builds(
    Groups, bits=st.sampled_from([4, 8]), values=st.sampled_from([1, 2, 7, 10, 64, 80, 128])
)


def packed_of(values_LS: Tensor, groups: Groups) -> Tensor:
    *lines, size = values_LS.shape
    packed_LPB = torch.full(
        (*lines, size // groups.values, groups.group_bytes), 0xAA, dtype=torch.uint8
    )
    encode(values_LS, packed_LPB, groups)
    return packed_LPB


def there_and_back(values_LS: Tensor, groups: Groups) -> Tensor:
    out_LS = torch.full_like(values_LS, math.nan)
    decode(packed_of(values_LS, groups), out_LS, groups)
    return out_LS


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    groups=GROUPS,
    seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 1e4]),
    middle=st.sampled_from([0.0, 1.0, -50.0]),
)
@pytest.mark.parametrize("tables", [False, True], ids=["operations", "tables"])
def test_what_comes_back_is_what_plain_arithmetic_says(tables, groups, seed, spread, middle):
    """Bit by bit; but a kernel that multiplies and adds in one rounds 8 bits less."""
    values = drawn(seed, 3, 2 * groups.values) * spread + middle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups_module, "_HAS_TABLES", tables and groups_module._HAS_TABLES)
        found = there_and_back(values, groups)

    by_group = values.unflatten(-1, (2, groups.values))
    expected = torch.from_numpy(rounded(by_group.numpy(), groups.bits)).flatten(-2)
    if tables and groups.bits == 8:
        assert (found - expected).abs().max() <= 2**-22 * values.abs().max()
    else:
        assert torch.equal(found, expected)


@given(groups=GROUPS, seed=st.integers(0, 99), exponent=st.integers(-10, 12))
def test_the_error_is_at_most_half_a_step_and_what_rounding_the_numbers_adds(
    groups, seed, exponent
):
    values = drawn(seed, 5, groups.values) * 2.0**exponent

    error = (there_and_back(values, groups) - values).abs().amax(-1)

    steps = 2**groups.bits - 1
    least = values.amin(-1)
    widened = 2**-10 * least.abs() if groups.bits == 4 else 2**-23 * least.abs()
    step = (values.amax(-1) - least + widened) / steps
    # The scale is rounded down by up to 2^-10 of itself, or to the next of the smallest float16s.
    slack = steps * (step * 2**-10 + 2**-24) if groups.bits == 4 else 1e-5 * step
    assert (error <= step / 2 + slack + 2**-22 * values.abs().amax(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_any_dtype_is_rounded_once_from_what_float32_says(bits, dtype):
    groups = Groups(bits=bits, values=64)
    values = drawn(1, 40, 128).to(dtype)

    found = there_and_back(values, groups)

    assert torch.equal(found, there_and_back(values.float(), groups).to(dtype))


@pytest.mark.parametrize("groups", [Groups(bits=b, values=v) for b in (4, 8) for v in (10, 64)])
def test_groups_of_one_value_and_of_zeros_come_back(groups):
    for value in (0.0, -0.0, 0.5, -2048.0, 65504.0, -65504.0):
        values = torch.full((2, groups.values), value)

        assert torch.equal(there_and_back(values, groups), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_values_of_a_dtype_become_nothing_that_is_no_number(bits, dtype):
    groups = Groups(bits=bits, values=64)
    values = drawn(2, 6, 64).to(dtype)
    most = torch.finfo(dtype).max
    for line, extremes in enumerate(([most], [-most], [most, -most], [1e5], [-1e5], [7e4, -7e4])):
        values[line, : len(extremes)] = torch.tensor(extremes).clamp(-most, most).to(dtype)

    found = there_and_back(values, groups)

    assert torch.isfinite(found).all()
    if bits == 4:  # so that what fits float16 before fits it after
        assert (found <= values.amax(-1, keepdim=True)).all()


def test_zero_bytes_are_zeros():
    """What is never filled is no NaN, which would go through a weight of 0."""
    for groups in (Groups(bits=4, values=10), Groups(bits=8, values=64)):
        out = torch.full((3, groups.values), math.nan)

        decode(torch.zeros(3, 1, groups.group_bytes, dtype=torch.uint8), out, groups)

        assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("bits", [4, 8])
def test_parts_give_the_bytes_that_the_whole_gives(bits, monkeypatch):
    groups = Groups(bits=bits, values=64)
    values = drawn(3, 7, 5, 192)
    whole = packed_of(values, groups)
    monkeypatch.setattr(groups_module, "AT_ONCE", 400)

    assert torch.equal(packed_of(values, groups), whole)
    assert torch.equal(packed_of(values[2:4, 1:], groups), whole[2:4, 1:])
    assert torch.equal(packed_of(values.mT.contiguous().mT, groups), whole)


@pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines, reason="FBGEMM is for x86"
)
@pytest.mark.parametrize("bits", [4, 8])
def test_groups_side_by_side_are_a_table_of_fbgemms(bits):
    groups = Groups(bits=bits, values=64)
    values = drawn(4, 9, 64)
    packed = packed_of(values, groups).view(9, -1)
    ops = torch.ops.quantized
    prepack, unpack = (
        (ops.embedding_bag_4bit_prepack, ops.embedding_bag_4bit_unpack)
        if bits == 4
        else (ops.embedding_bag_byte_prepack, ops.embedding_bag_byte_unpack)
    )
    theirs = prepack(values)
    read = torch.empty_like(values)
    decode(theirs.view(9, 1, -1), read, groups)

    assert packed.shape == theirs.shape
    assert torch.allclose(unpack(packed), there_and_back(values, groups), atol=1e-6)
    assert torch.allclose(unpack(theirs), read, atol=1e-6)
    assert torch.allclose(read, values, atol=0.2 if bits == 4 else 0.02)


# ---- keys and values


Along = Literal["tokens", "features"]


def error_of(keys_NKGE: Tensor, along: Along) -> Tensor:
    """How far attention scores of keys are off when these are packed, on average."""
    plane = Plane(num_heads=keys_NKGE.shape[1], head_dim=keys_NKGE.shape[3], bits=4, along=along)
    lines = keys_NKGE.mT if along == "tokens" else keys_NKGE
    found = there_and_back(lines.contiguous(), plane.groups)
    found_NKGE = found.mT if along == "tokens" else found
    q_NKLE = drawn(9, *keys_NKGE.shape[:2], 8, keys_NKGE.shape[3])
    return (q_NKLE @ (found_NKGE - keys_NKGE).mT).square().mean().sqrt()


def test_keys_with_outlier_features_keep_far_more_along_tokens_than_along_features():
    """KIVI's reason, and how much better than FlexGen's groups that is at the same bits."""
    keys = drawn(5, 2, 3, 128, 64)
    both: tuple[Along, Along] = ("tokens", "features")
    plain = {along: error_of(keys, along) for along in both}
    keys[..., 7] = keys[..., 7] * 4 + 60
    keys[..., 30] = keys[..., 30] * 4 - 90
    outliers = {along: error_of(keys, along) for along in both}

    assert 0.9 < plain["tokens"] / plain["features"] < 1.1
    assert outliers["tokens"] < outliers["features"] / 5


@given(
    num_heads=st.integers(1, 4),
    head_dim=st.sampled_from([1, 10, 64, 80, 128, 576]),
    bits=st.sampled_from([4, 8]),
    along=st.sampled_from(["tokens", "features"]),
    num_groups=st.integers(1, 4),
)
def test_a_page_takes_its_groups_and_no_more(num_heads, head_dim, bits, along, num_groups):
    plane = Plane(num_heads=num_heads, head_dim=head_dim, bits=bits, along=along)
    width = num_groups * GROUP_VALUES

    heads, lines, per_line, group_bytes = plane.shape(width)

    assert plane.num_bytes(width) == heads * lines * per_line * group_bytes
    assert lines * per_line * plane.groups.values == width * head_dim
    assert plane.num_bytes(width) == num_groups * plane.num_bytes(GROUP_VALUES)
    if head_dim % 64 == 0 or along == "tokens":
        assert 8 * plane.num_bytes(width) / (num_heads * head_dim * width) == bits * 9 / 8


def test_codecs_are_those_that_a_policy_takes():
    from flexport.policy import CACHE_CODECS

    assert ("none", *BITS) == CACHE_CODECS

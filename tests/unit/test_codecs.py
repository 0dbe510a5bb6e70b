"""Packed matrices decode exactly, and any range of their rows as in the whole.

The encoders are the references: they are written from the formats' own definitions, value by value.

Dimension key: R rows, D features, P groups a row, B bytes of a group, Q blocks along rows.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexport.codecs import fp8, mxfp4

DTYPES = [torch.float32, torch.bfloat16]


def e2m1(nibble: int) -> float:
    """Sign, exponent with a bias of 1, fraction; no exponent is a subnormal."""
    sign, exponent, fraction = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
    return math.copysign(size, -1 if sign else 1)


def encode_mxfp4(nibbles_RD: Tensor) -> Tensor:
    pairs = nibbles_RD.view(len(nibbles_RD), -1, mxfp4.GROUP_BYTES, 2)
    return (pairs[..., 0] | pairs[..., 1] << 4).to(torch.uint8)


def draw(*shape: int, below: int, seed: int) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(seed))


@given(
    num_rows=st.integers(1, 5),
    num_groups=st.integers(1, 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_each_four_bits_are_their_number_times_their_groups_power_of_two(
    num_rows, num_groups, dtype, seed
):
    nibbles_RD = draw(num_rows, 32 * num_groups, below=16, seed=seed)
    # Below 253, since 6 times any greater power is beyond float32.
    scales_RP = draw(num_rows, num_groups, below=253, seed=seed + 1).to(torch.uint8)

    out_RD = torch.empty(num_rows, 32 * num_groups, dtype=dtype)
    mxfp4.decode(encode_mxfp4(nibbles_RD), scales_RP, out_RD)

    for row, column in ((r, c) for r in range(num_rows) for c in range(32 * num_groups)):
        exponent = int(scales_RP[row, column // 32]) - 127
        expected = e2m1(int(nibbles_RD[row, column])) * 2.0**exponent
        assert out_RD[row, column].item() == expected
        assert math.copysign(1, out_RD[row, column].item()) == math.copysign(1, expected)


def test_a_scale_that_is_not_a_number_makes_its_group_so_and_no_other():
    blocks_RPB = torch.zeros(1, 2, 16, dtype=torch.uint8)
    scales_RP = torch.tensor([[255, 127]], dtype=torch.uint8)

    out_RD = mxfp4.decode(blocks_RPB, scales_RP, torch.empty(1, 64))

    assert out_RD[0, :32].isnan().all()
    assert (out_RD[0, 32:] == 0).all()


def test_mxfp4_is_what_transformers_reads():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks_ERPB = draw(2, 5, 3, 16, below=256, seed=0).to(torch.uint8)
    scales_ERP = (110 + draw(2, 5, 3, below=30, seed=1)).to(torch.uint8)

    out_ERD = torch.empty(2, 5, 96, dtype=torch.bfloat16)
    mxfp4.decode(blocks_ERPB, scales_ERP, out_ERD)

    # It gives each expert's matrix the other way round.
    assert torch.equal(out_ERD, convert(blocks_ERPB, scales_ERP).transpose(1, 2))


@given(data=st.data(), num_rows=st.integers(1, 9))
def test_any_rows_of_mxfp4_decode_as_in_the_whole(data, num_rows):
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    blocks_RPB = draw(num_rows, 2, 16, below=256, seed=0).to(torch.uint8)
    scales_RP = draw(num_rows, 2, below=255, seed=1).to(torch.uint8)
    whole_RD = mxfp4.decode(blocks_RPB, scales_RP, torch.empty(num_rows, 64))

    part_RD = torch.empty(end - begin, 64)
    mxfp4.decode(blocks_RPB[begin:end], scales_RP[begin:end], part_RD)

    assert torch.equal(part_RD, whole_RD[begin:end])


def test_a_matrix_of_more_values_than_are_decoded_at_once_is_decoded_to_its_end(monkeypatch):
    blocks_RPB = draw(7, 3, 16, below=256, seed=0).to(torch.uint8)
    scales_RP = draw(7, 3, below=253, seed=1).to(torch.uint8)
    packed_RD = draw(7, 96, below=120, seed=2).to(torch.uint8).view(torch.float8_e4m3fn)
    scales_QP = torch.rand(3, 2)
    whole_RD = mxfp4.decode(blocks_RPB, scales_RP, torch.empty(7, 96))
    other_RD = fp8.decode_blocks(packed_RD, scales_QP, torch.empty(7, 96), block=(3, 64))

    monkeypatch.setattr(mxfp4, "_AT_ONCE", 128)
    monkeypatch.setattr(fp8, "_AT_ONCE", 200)

    assert torch.equal(mxfp4.decode(blocks_RPB, scales_RP, torch.empty(7, 96)), whole_RD)
    again_RD = fp8.decode_blocks(packed_RD, scales_QP, torch.empty(7, 96), block=(3, 64))
    assert torch.equal(again_RD, other_RD)


def encode_fp8(values_RD: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Each block's largest number becomes the format's, 448."""
    packed_RD = torch.empty_like(values_RD, dtype=torch.float8_e4m3fn)
    scales_QP = torch.empty(-(-len(values_RD) // rows), -(-values_RD.shape[1] // columns))
    for q, p in ((q, p) for q in range(len(scales_QP)) for p in range(scales_QP.shape[1])):
        block = slice(q * rows, (q + 1) * rows), slice(p * columns, (p + 1) * columns)
        scales_QP[q, p] = values_RD[block].abs().max() / 448
        packed_RD[block] = (values_RD[block] / scales_QP[q, p]).to(torch.float8_e4m3fn)
    return packed_RD, scales_QP


@settings(deadline=None)
@given(
    num_rows=st.integers(1, 11),
    size=st.integers(1, 11),
    block=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dtype=st.sampled_from(DTYPES),
)
def test_each_eight_bits_are_their_number_times_their_blocks_scale(num_rows, size, block, dtype):
    values_RD = torch.randn(num_rows, size, generator=torch.Generator().manual_seed(0))
    packed_RD, scales_QP = encode_fp8(values_RD, *block)

    out_RD = torch.empty(num_rows, size, dtype=dtype)
    fp8.decode_blocks(packed_RD, scales_QP, out_RD, block=block)

    for row, column in ((r, c) for r in range(num_rows) for c in range(size)):
        scale = scales_QP[row // block[0], column // block[1]]
        assert out_RD[row, column] == (packed_RD[row, column].float() * scale).to(dtype)
    # Three bits of fraction: half of a sixteenth, and bfloat16 adds its own half of 1/256.
    torch.testing.assert_close(out_RD.float(), values_RD, rtol=0.07, atol=0.005)


@settings(deadline=None)
@given(data=st.data(), num_rows=st.integers(1, 11), block_rows=st.integers(1, 4))
def test_any_rows_of_fp8_decode_as_in_the_whole(data, num_rows, block_rows):
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    values_RD = torch.randn(num_rows, 7, generator=torch.Generator().manual_seed(0))
    packed_RD, scales_QP = encode_fp8(values_RD, block_rows, 3)
    block = (block_rows, 3)
    whole_RD = fp8.decode_blocks(packed_RD, scales_QP, torch.empty(num_rows, 7), block=block)

    first, last = fp8.scale_rows(begin, end, block_rows)
    part_RD = torch.empty(end - begin, 7)
    fp8.decode_blocks(
        packed_RD[begin:end], scales_QP[first:last], part_RD, block=block, begin=begin
    )

    assert torch.equal(part_RD, whole_RD[begin:end])


def test_one_scale_may_do_for_a_whole_matrix():
    packed_RD = torch.tensor([[1.0, -2.0], [448.0, 0.0]]).to(torch.float8_e4m3fn)

    out_RD = fp8.decode_tensor(packed_RD, torch.tensor(0.25), torch.empty(2, 2))

    assert out_RD.tolist() == [[0.25, -0.5], [112.0, 0.0]]

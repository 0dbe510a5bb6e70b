"""MXFP4 decodes exactly, and any range of its rows as in the whole.

The encoder is the reference: it is written from the format's own definition, value by value.

Dimension key: R rows, D features, P groups a row, B bytes of a group.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flexport.codecs import groups
from flexport.codecs.forms import Mxfp4

DTYPES = [torch.float32, torch.bfloat16]


def e2m1(nibble: int) -> float:
    """Sign, exponent with a bias of 1, fraction; no exponent is a subnormal."""
    sign, exponent, fraction = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = fraction / 2 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + fraction / 2)
    return math.copysign(size, -1 if sign else 1)


def decode(blocks_RPB: Tensor, scales_RP: Tensor, out_RD: Tensor) -> Tensor:
    return Mxfp4().decode([blocks_RPB, scales_RP], out_RD, 0)


def encode_mxfp4(nibbles_RD: Tensor) -> Tensor:
    pairs = nibbles_RD.view(len(nibbles_RD), -1, 16, 2)
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
    decode(encode_mxfp4(nibbles_RD), scales_RP, out_RD)

    for row, column in ((r, c) for r in range(num_rows) for c in range(32 * num_groups)):
        exponent = int(scales_RP[row, column // 32]) - 127
        expected = e2m1(int(nibbles_RD[row, column])) * 2.0**exponent
        assert out_RD[row, column].item() == expected
        assert math.copysign(1, out_RD[row, column].item()) == math.copysign(1, expected)


def test_a_scale_that_is_not_a_number_makes_its_group_so_and_no_other():
    blocks_RPB = torch.zeros(1, 2, 16, dtype=torch.uint8)
    scales_RP = torch.tensor([[255, 127]], dtype=torch.uint8)

    out_RD = decode(blocks_RPB, scales_RP, torch.empty(1, 64))

    assert out_RD[0, :32].isnan().all()
    assert (out_RD[0, 32:] == 0).all()


def test_mxfp4_is_what_transformers_reads():
    convert = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks_ERPB = draw(2, 5, 3, 16, below=256, seed=0).to(torch.uint8)
    scales_ERP = (110 + draw(2, 5, 3, below=30, seed=1)).to(torch.uint8)

    out_ERD = torch.empty(2, 5, 96, dtype=torch.bfloat16)
    decode(blocks_ERPB.flatten(0, 1), scales_ERP.flatten(0, 1), out_ERD.view(10, 96))

    # It gives each expert's matrix the other way round.
    assert torch.equal(out_ERD, convert(blocks_ERPB, scales_ERP).transpose(1, 2))


@given(data=st.data(), num_rows=st.integers(1, 9))
def test_any_rows_of_mxfp4_decode_as_in_the_whole(data, num_rows):
    begin = data.draw(st.integers(0, num_rows - 1))
    end = data.draw(st.integers(begin + 1, num_rows))
    blocks_RPB = draw(num_rows, 2, 16, below=256, seed=0).to(torch.uint8)
    scales_RP = draw(num_rows, 2, below=255, seed=1).to(torch.uint8)
    whole_RD = decode(blocks_RPB, scales_RP, torch.empty(num_rows, 64))

    part_RD = torch.empty(end - begin, 64)
    decode(blocks_RPB[begin:end], scales_RP[begin:end], part_RD)

    assert torch.equal(part_RD, whole_RD[begin:end])


def test_a_matrix_of_more_values_than_are_decoded_at_once_is_decoded_to_its_end(monkeypatch):
    blocks_RPB = draw(7, 3, 16, below=256, seed=0).to(torch.uint8)
    scales_RP = draw(7, 3, below=253, seed=1).to(torch.uint8)
    whole_RD = decode(blocks_RPB, scales_RP, torch.empty(7, 96))

    monkeypatch.setattr(groups, "_AT_ONCE", 128)

    assert torch.equal(decode(blocks_RPB, scales_RP, torch.empty(7, 96)), whole_RD)

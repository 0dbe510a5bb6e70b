"""Small floats are what torch and the formats' definitions say, all of their bit patterns."""

from __future__ import annotations

import math

import torch

from flexport.codecs.floats import fill_float4, fill_float8, powers_of_two


def test_every_float8_is_torchs():
    numbers_RD = torch.arange(256).to(torch.uint8).view(16, 16).view(torch.float8_e4m3fn)

    out_RD = torch.empty(16, 16)
    fill_float8(numbers_RD, out_RD)

    expected_RD = numbers_RD.float()
    torch.testing.assert_close(out_RD, expected_RD, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out_RD.signbit(), expected_RD.signbit())


def test_every_byte_is_two_floats_of_four_bits():
    sizes = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    numbers = [*sizes, *(-size for size in sizes)]
    bytes_RB = torch.arange(256).to(torch.uint8).view(1, 256)

    out_RD = torch.empty(1, 512)
    fill_float4(bytes_RB, out_RD)

    expected_D = torch.tensor(
        [each for b in range(256) for each in (numbers[b & 15], numbers[b >> 4])]
    )
    assert torch.equal(out_RD[0], expected_D)
    assert torch.equal(out_RD[0].signbit(), expected_D.signbit())


def test_every_scale_of_eight_bits_is_a_power_of_two():
    powers = powers_of_two(torch.arange(256).to(torch.uint8).view(1, 256))[0].tolist()

    assert powers[:255] == [2.0 ** (s - 127) for s in range(255)]
    assert math.isnan(powers[255])

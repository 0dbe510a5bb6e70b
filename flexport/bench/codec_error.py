"""How much of a matrix a codec loses: `python -m flexport.bench.codec_error`.

Prints a line for each way to keep weights: its bits a weight, and the squared error in per cent of
the weights' squares, for weights of several distributions. The matrices are drawn afresh from a
seed, so anyone gets the same numbers.

"flexgen" is FlexGen's own rounding (arXiv:2303.06865, section 5): the least value and the scale of a
group in float16, as many bits as a zero and a scale in bfloat16. "search" is the best of all bfloat16
scales and 32 zeros a step, for the first groups only: what is left to be gained.

Dimension key: R rows, D features, N groups, G values a group, C candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from flexport.codecs.quantise import (
    Method,
    dequantise_groups,
    dequantise_rows,
    quantise_groups,
    quantise_rows,
)

__all__ = ["DISTRIBUTIONS", "flexgen", "main", "searched", "weights"]

DISTRIBUTIONS = ("gauss", "laplace", "student-t(4)", "outliers")
"""The last is Gaussian with every 256th feature ten times as large."""

COLUMNS = 4096

ROWS = 256

SEARCHED_ROWS = 1
"""Rows that an exhaustive search is tried on; it takes seconds for each."""


def weights(distribution: str, num_rows: int, size: int, seed: int = 0) -> Tensor:
    """A matrix of float32 weights of about the size that a model's have."""
    shape = (num_rows, size)
    generator = torch.Generator().manual_seed(seed)
    normal_RD = torch.randn(shape, generator=generator) * 0.02
    if distribution == "laplace":
        # A normal number whose variance is exponentially distributed.
        normal_RD *= torch.empty(shape).exponential_(generator=generator).mul_(2).sqrt_()
    elif distribution == "student-t(4)":
        normal_RD /= torch.randn((4, *shape), generator=generator).square().mean(0).sqrt()
    elif distribution == "outliers":
        normal_RD[:, ::256] *= 10
    else:
        assert distribution == "gauss", distribution
    return normal_RD


def flexgen(values_RD: Tensor, *, bits: int, group: int) -> Tensor:
    """What FlexGen's packing would make of weights."""
    steps = 2**bits - 1
    values_NG = values_RD.view(-1, group)
    low_N1, high_N1 = values_NG.amin(1, keepdim=True), values_NG.amax(1, keepdim=True)
    low_N1, scale_N1 = low_N1.half().float(), ((high_N1 - low_N1) / steps).half().float()
    codes_NG = ((values_NG - low_N1) / scale_N1).round().clamp(0, steps)
    made_NG: Tensor = codes_NG * scale_N1 + low_N1
    return made_NG.view(values_RD.shape)


def searched(values_RD: Tensor, *, bits: int, group: int) -> Tensor:
    """The best that scales and zeros in bfloat16 can make of weights, near enough."""
    found = [_searched(values_G, bits) for values_G in values_RD.view(-1, group)]
    return torch.stack(found).view(values_RD.shape)


def _searched(values_G: Tensor, bits: int) -> Tensor:
    middle, top = 2 ** (bits - 1), 2 ** (bits - 1) - 1
    low, high = values_G.min(), values_G.max()
    best_G, least = values_G, torch.inf
    scales = torch.linspace(0.3, 1.1, 800) * (high - low) / (middle + top)
    for scale in scales.bfloat16().unique().float():
        # From where the grid hangs over at one end to where it does at the other.
        ends = torch.stack([low + middle * scale, high - top * scale])
        begin, end = float(ends.min() - scale / 2), float(ends.max() + scale / 2)
        zeros_C1 = torch.arange(begin, end, float(scale) / 32).bfloat16().float()[:, None]
        codes_CG = ((values_G - zeros_C1) / scale).round().clamp(-middle, top)
        made_CG = codes_CG * scale + zeros_C1
        error_C = (made_CG - values_G).square().sum(1)
        if error_C.min() < least:
            best_G, least = made_CG[error_C.argmin()], float(error_C.min())
    return best_G


def _ways() -> Iterator[tuple[str, float, int, Callable[[Tensor], Tensor]]]:
    """Each way's name, bits a weight, rows it is tried on, and what it makes of weights."""
    few = SEARCHED_ROWS
    layouts = ((4, 64, few), (4, 64, ROWS), (4, 32, ROWS), (4, 128, ROWS))
    for bits, group, num_rows in (*layouts, (2, 64, ROWS), (3, 64, ROWS), (8, 64, ROWS)):
        size = bits + 32 / group
        yield "flexgen", size, num_rows, partial(flexgen, bits=bits, group=group)
        yield "min-max", size, num_rows, partial(_grouped, bits=bits, group=group, method="min-max")
        yield "refined", size, num_rows, partial(_grouped, bits=bits, group=group, method="refined")
        if num_rows == few:
            yield "search", size, num_rows, partial(searched, bits=bits, group=group)
    yield "rows", 8 + 32 / COLUMNS, ROWS, _by_rows


def _grouped(values_RD: Tensor, *, bits: int, group: int, method: Method) -> Tensor:
    made = quantise_groups(values_RD, bits=bits, group=group, method=method)
    return dequantise_groups(made, torch.empty_like(values_RD))


def _by_rows(values_RD: Tensor) -> Tensor:
    return dequantise_rows(*quantise_rows(values_RD), torch.empty_like(values_RD))


def main() -> None:
    """Print the table."""
    out = sys.stdout
    out.write(f"{'way':8} {'bits':>6} {'rows':>5}")
    out.write("".join(f" {name:>13}" for name in DISTRIBUTIONS) + "\n")
    for name, bits, num_rows, way in _ways():
        out.write(f"{name:8} {bits:6.3f} {num_rows:5}")
        for distribution in DISTRIBUTIONS:
            values_RD = weights(distribution, num_rows, COLUMNS)
            off_RD = way(values_RD).double() - values_RD.double()
            share = float(off_RD.square().sum() / values_RD.double().square().sum())
            out.write(f" {share * 100:12.5f}%")
            out.flush()
        out.write("\n")


if __name__ == "__main__":
    main()

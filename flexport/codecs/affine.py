"""The scale and the zero of a group of weights: a uniform grid of levels laid over its values.

A group's values w are stood for by zero + scale * q with a whole number q, -middle <= q <= levels -
middle, where levels = 2 ** bits - 1 and middle = 2 ** (bits - 1). Scale and zero are kept in
bfloat16, which is what torch's own kernels for packed weights read, so whatever is proposed here is
rounded first and judged afterwards, with the codes that are nearest given the rounded numbers:
what is compared is what will be kept, and rounding is never a loss that nobody counted.

`between` lays the grid from a group's least value to its greatest, as FlexGen does
(arXiv:2303.06865, section 5). `refined` looks for the grid of least squared error. As a function
of scale and zero the error has many shallow valleys: each has codes of its own, and moving an end
of the grid by a third of a step leads into the next. So one grid is tried for each of some
positions of both ends, and the best is then fitted to its own codes by least squares (S. Lloyd,
"Least squares quantization in PCM", 1982, with the levels evenly spaced). At 4 bits and groups of 64
this comes to within 1 to 2 % of an exhaustive search; `python -m flexport.bench.codec_error`
prints both.

No operation here mixes groups, and none multiplies and adds at once, which a processor may round in
one way inside a vector and in another at its end. So a group gets the same grid in any company.

Dimension key: N groups, G values a group, 1 a group's own number, to be broadcast.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Grid", "Levels", "Work", "between", "nearest", "refined"]

_MOVES = [ends for ends in itertools.product((-1 / 3, 0, 1 / 3, 2 / 3, 1), repeat=2) if any(ends)]
"""How far the low and the high end of the first grid move inwards, in its steps.

More of them find less and less: for Gaussian weights and 4 bits, 9, 16, 25 and 36 end 2.6, 1.5, 1.1
and 0.8 % above what hundreds find. Further than a step inwards, the values that are clipped lose
more than all others gain, even with 4 levels; outwards matters most with 256.
"""

_FITS = 2
"""Times that a grid is fitted to its codes; the first takes off 2 %, the second 0.4, a third 0.1."""

_TINY = torch.finfo(torch.bfloat16).tiny
"""The least scale. A group without a range has some scale too, and nothing is divided by 0; weights
this near to each other are not told apart."""

_LARGEST = 1.98 * 2.0**127
"""No end of a grid is beyond this, so that rounding its scale or zero up does not end in infinity."""


@dataclass(frozen=True, slots=True)
class Levels:
    """What codes there are: whole numbers from -middle to top."""

    bits: int

    @property
    def middle(self) -> int:
        """The code that is kept for zero."""
        return 1 << self.bits - 1

    @property
    def top(self) -> int:
        """The greatest whole number."""
        return self.middle - 1

    @property
    def steps(self) -> int:
        """Steps from the least to the greatest."""
        return (1 << self.bits) - 1


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid for each group. Both are float32 that bfloat16 holds exactly, and scales are above 0."""

    scale_N1: Tensor
    zero_N1: Tensor


@dataclass(frozen=True, slots=True)
class Work:
    """Two buffers of a chunk's size, float32."""

    places_NG: Tensor
    codes_NG: Tensor


def between(low_N1: Tensor, high_N1: Tensor, levels: Levels) -> Grid:
    """The grids that reach from each group's least value to its greatest."""
    low_N1, high_N1, step_N1 = _ends(low_N1, high_N1, levels)
    return _finite(_reaching(low_N1, high_N1, step_N1, levels), levels)


def refined(values_NG: Tensor, low_N1: Tensor, high_N1: Tensor, levels: Levels, work: Work) -> Grid:
    """The best grids found for groups with these least and greatest values.

    None has more error than that which `between` gives.
    """
    low_N1, high_N1, step_N1 = _ends(low_N1, high_N1, levels)
    best = _reaching(low_N1, high_N1, step_N1, levels)
    least_N1 = _error(values_NG, best, levels, work)
    for up, down in _MOVES:
        moved_low_N1, moved_high_N1 = low_N1 + up * step_N1, high_N1 - down * step_N1
        moved_step_N1 = (1 - (up + down) / levels.steps) * step_N1
        grid = _reaching(moved_low_N1, moved_high_N1, moved_step_N1, levels)
        best, least_N1 = _better(best, least_N1, grid, _error(values_NG, grid, levels, work))
    grid = best
    _error(values_NG, grid, levels, work)
    for _ in range(_FITS):
        grid = _fitted(grid, work)
        best, least_N1 = _better(best, least_N1, grid, _error(values_NG, grid, levels, work))
    return _finite(best, levels)


def nearest(values_NG: Tensor, grid: Grid, levels: Levels, work: Work) -> Tensor:
    """The whole number nearest to each value's place, as a float32 in work.codes_NG.

    Leaves in work.places_NG where the values lie, in steps from zero.
    """
    torch.sub(values_NG, grid.zero_N1, out=work.places_NG).div_(grid.scale_N1)
    return torch.round(work.places_NG, out=work.codes_NG).clamp_(-levels.middle, levels.top)


def _error(values_NG: Tensor, grid: Grid, levels: Levels, work: Work) -> Tensor:
    """The root of each group's squared error.

    Leaves codes in work, and how far from them the values lie, in steps.
    """
    codes_NG = nearest(values_NG, grid, levels, work)
    # In steps first: squares of very small weights would be 0.
    steps_N1: Tensor = torch.linalg.vector_norm(work.places_NG.sub_(codes_NG), dim=1, keepdim=True)
    return steps_N1 * grid.scale_N1


def _fitted(grid: Grid, work: Work) -> Grid:
    """The grid of least squares for the codes that `_error` left in work.

    That is the line through what the codes are off by, as a function of the code: its height moves
    the zero, and its slope, given the rounded zero, changes the scale.
    """
    off_NG, codes_NG = work.places_NG, work.codes_NG
    count = codes_NG.shape[1]
    sum_off_N1 = off_NG.sum(1, keepdim=True)
    sum_N1 = codes_NG.sum(1, keepdim=True)
    sum_both_N1 = off_NG.mul_(codes_NG).sum(1, keepdim=True)
    sum_squares_N1 = codes_NG.square_().sum(1, keepdim=True)
    # If all codes are alike the spread is 0, and so is what it divides, but for rounding.
    spread_N1 = (count * sum_squares_N1 - sum_N1 * sum_N1).clamp_min(1)
    height_N1 = (sum_off_N1 * sum_squares_N1 - sum_N1 * sum_both_N1) / spread_N1
    zero_N1 = _rounded(grid.zero_N1 + height_N1 * grid.scale_N1)
    moved_N1 = (grid.zero_N1 - zero_N1) / grid.scale_N1
    slope_N1 = (sum_both_N1 + moved_N1 * sum_N1) / sum_squares_N1.clamp_min(1)
    scale_N1 = (1 + slope_N1) * grid.scale_N1
    return Grid(_rounded(scale_N1.clamp_min_(_TINY)), zero_N1)


def _better(best: Grid, least_N1: Tensor, grid: Grid, error_N1: Tensor) -> tuple[Grid, Tensor]:
    """For each group the grid of less error, and that error; what is not a number is not better."""
    is_better_N1 = error_N1 < least_N1
    scale_N1 = torch.where(is_better_N1, grid.scale_N1, best.scale_N1)
    zero_N1 = torch.where(is_better_N1, grid.zero_N1, best.zero_N1)
    return Grid(scale_N1, zero_N1), torch.where(is_better_N1, error_N1, least_N1)


def _ends(low_N1: Tensor, high_N1: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Where the first grid begins and ends, and its step."""
    low_N1 = low_N1.clamp(-_LARGEST, _LARGEST)
    high_N1 = high_N1.clamp(-_LARGEST, _LARGEST)
    # Each end is divided by itself, since their distance may be beyond float32.
    return low_N1, high_N1, high_N1 / levels.steps - low_N1 / levels.steps


def _reaching(low_N1: Tensor, high_N1: Tensor, step_N1: Tensor, levels: Levels) -> Grid:
    """The grid from low to high, as nearly as bfloat16 allows; `step_N1` is about its scale.

    The zero is rounded first, and the scale is then chosen so that both ends are reached from it.
    So a group of like values far from 0 is not lost between a rounded zero and a small scale.
    """
    # From above, where there are fewer steps: all of those below may be beyond float32.
    zero_N1 = _rounded(high_N1 - levels.top * step_N1)
    above_N1 = (high_N1 - zero_N1) / levels.top
    below_N1 = (zero_N1 - low_N1) / levels.middle
    return Grid(_rounded(torch.maximum(above_N1, below_N1).clamp_min_(_TINY)), zero_N1)


def _finite(grid: Grid, levels: Levels) -> Grid:
    """The same grid, unless an end of it, or its distance from zero, is beyond float32."""
    down_N1 = (_LARGEST + grid.zero_N1.clamp_max(0)) / levels.middle
    up_N1 = (_LARGEST - grid.zero_N1.clamp_min(0)) / levels.top
    room_N1 = torch.minimum(down_N1, up_N1).clamp_min_(_TINY)
    return Grid(_rounded(torch.minimum(grid.scale_N1, room_N1)), grid.zero_N1)


def _rounded(numbers_N1: Tensor) -> Tensor:
    return numbers_N1.bfloat16().float()

"""Packed matrices with the numbers that they stand for, and what products with them must be.

They are made value by value from what `flexport.backend.PackedMatrix` says, with no codec.

Dimension key: T tokens, D features in, F features out, B tiles, C bytes of a feature in a tile (32),
I rows of a tile (64), G groups of a row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from flexport.backend import Backend, MultipliesPacked, PackedMatrix
from flexport.testing.conformance.problems import must_be_close
from flexport.testing.conformance.tensors import on_host, placed, some

__all__ = ["MultiplyingBackend", "PackedProduct", "Sizes", "placed_matrix"]

ROUNDED_TO_8_BITS = 0.03
"""What a token may lose, as a share of its size. 127 steps up to its largest feature are an error of
1 / (127 * sqrt(12)) of it on the average; of normal numbers the largest of some thousands is 4 to 5
times their root mean square, so a product is off by 1 %, and by a few tenths more for weights that
are rounded to the dtype. The rest is for rows of few features out, which are no good average."""


class MultiplyingBackend(Backend, MultipliesPacked, Protocol):
    """A backend that has the optional power."""


class Sizes(NamedTuple):
    """A packed matrix as a test's name shows it."""

    form: Literal["int8", "int4"]
    group: int
    num_out: int
    num_in: int

    def __str__(self) -> str:
        return f"{self.form}{f':{self.group}' if self.group else ''}-{self.num_out}x{self.num_in}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedProduct:
    """A product with a packed matrix and what its result must be."""

    x_TD: Tensor
    matrix: PackedMatrix
    """In host memory."""
    values_FD: Tensor
    """What it stands for, in float64."""
    sizes_FD: Tensor
    """The sizes of what each value is added up from: that much is rounded."""
    bias_F: Tensor | None = None

    @classmethod
    def draw(
        cls,
        sizes: Sizes,
        num_tokens: int,
        dtype: torch.dtype,
        *,
        with_bias: bool = False,
        seed: int = 0,
    ) -> PackedProduct:
        """Random operands; tokens differ in size by up to 4096 times."""
        matrix, values_FD, sizes_FD = (_int8 if sizes.form == "int8" else _int4)(sizes, seed)
        powers_T1 = torch.arange(num_tokens)[:, None] * 5 % 13 - 6
        x_TD = some((num_tokens, sizes.num_in), torch.float32, seed=seed) * 2.0**powers_T1
        bias_F = some((sizes.num_out,), dtype, seed=seed + 1) if with_bias else None
        return cls(
            x_TD=x_TD.to(dtype),
            matrix=matrix,
            values_FD=values_FD,
            sizes_FD=sizes_FD,
            bias_F=bias_F,
        )

    def on_device(self, backend: Backend) -> tuple[Tensor, PackedMatrix, Tensor | None]:
        """x, matrix and bias."""
        bias_F = None if self.bias_F is None else placed(backend, self.bias_F)
        return placed(backend, self.x_TD), placed_matrix(backend, self.matrix), bias_F

    def run(self, backend: MultiplyingBackend) -> Tensor:
        """The backend's answer, in host memory."""
        x_TD, matrix, bias_F = self.on_device(backend)
        (out_TF,) = backend.matmul_packed(x_TD, [matrix], [bias_F])
        return on_host(backend, out_TF)

    def check(self, out_TF: Tensor, *, lengths_T: Tensor | None = None) -> None:
        """In float32 the bound of `matmul`, with two roundings more for what a value is made of.

        In a narrower dtype each token by itself: the length of its error is at most
        `ROUNDED_TO_8_BITS` of what the product's is expected to be, and what rounding the result
        takes. `lengths_T` are the tokens' lengths where not all features are to count.
        """
        dtype, (exact_TF, rounded_TF, summed_TF) = self.x_TD.dtype, self._bounds()
        if dtype is torch.float32:
            must_be_close(out_TF, exact_TF, rounded_TF + summed_TF, dtype)
            return
        assert out_TF.dtype is dtype
        assert out_TF.shape == exact_TF.shape
        if lengths_T is None:
            lengths_T = self.x_TD.double().norm(dim=1)
        gain = self.values_FD.norm() / self.values_FD.shape[1] ** 0.5
        bound_T = ROUNDED_TO_8_BITS * gain * lengths_T + rounded_TF.norm(dim=1)
        error_T = (out_TF.double() - exact_TF).norm(dim=1)
        # Written so that NaN fails.
        bad_T = ~(error_T <= bound_T)
        assert not bad_T.any(), (
            f"{int(bad_T.sum())} of {len(bad_T)} tokens are off, {self.matrix.form} of shape "
            f"{self.matrix.shape}; the worst by "
            f"{float((error_T / (gain * lengths_T)).nan_to_num(torch.inf).max()):.1%} of its size, "
            f"allowed about {ROUNDED_TO_8_BITS:.1%} ({dtype})"
        )

    def check_same(self, out_TF: Tensor, other_TF: Tensor) -> None:
        """Two answers differ by the order of sums alone, and by how that is rounded twice."""
        _, rounded_TF, summed_TF = self._bounds()
        bound_TF = 4 * rounded_TF + 2 * summed_TF
        must_be_close(out_TF, other_TF.double(), bound_TF, other_TF.dtype)

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """Exact results, what rounding them (with and without bias) takes, and what sums do."""
        x_TD = self.x_TD.double()
        product_TF, summed_TF = x_TD @ self.values_FD.T, x_TD.abs() @ self.sizes_FD.T
        exact_TF = product_TF
        if self.bias_F is not None:
            exact_TF = product_TF + self.bias_F.double()
            summed_TF += self.bias_F.double().abs()
        unit = torch.finfo(self.x_TD.dtype).eps / 2
        rounded_TF = 1.01 * unit * (product_TF.abs() + exact_TF.abs())
        return exact_TF, rounded_TF, (x_TD.shape[1] + 4) * 2**-24 * summed_TF


def placed_matrix(backend: Backend, matrix: PackedMatrix) -> PackedMatrix:
    """The same on the device."""
    return replace(matrix, parts=tuple(placed(backend, part) for part in matrix.parts))


def _int8(sizes: Sizes, seed: int) -> tuple[PackedMatrix, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shape = sizes.num_out, sizes.num_in
    codes_FD = torch.randint(-127, 128, shape, dtype=torch.int8, generator=draw)
    scales_F = (torch.rand(sizes.num_out, generator=draw) + 0.5) / 127
    values_FD = codes_FD.double() * scales_F.double()[:, None]
    matrix = PackedMatrix(form="int8", parts=(codes_FD, scales_F), shape=shape)
    return matrix, values_FD, values_FD.abs()


def _int4(sizes: Sizes, seed: int) -> tuple[PackedMatrix, Tensor, Tensor]:
    _, group, num_out, num_in = sizes
    draw = torch.Generator().manual_seed(seed)
    num_tiles, num_groups = -(-num_out // 64), -(-num_in // group)
    codes_FD = torch.randint(0, 16, (num_out, num_in), dtype=torch.uint8, generator=draw)
    scales_FG = ((torch.rand(num_out, num_groups, generator=draw) + 0.5) / 8).bfloat16()
    zeros_FG = (torch.randn(num_out, num_groups, generator=draw) / 4).bfloat16()
    codes_BDC = torch.zeros(num_tiles, num_in, 32, dtype=torch.uint8)
    # Rows that belong to nothing hold what would be seen.
    pairs_BGI2 = torch.full((num_tiles, num_groups, 64, 2), torch.nan, dtype=torch.bfloat16)
    for row in range(num_out):
        tile, place = divmod(row, 64)
        codes_BDC[tile, :, place % 32] |= codes_FD[row] << (4 if place >= 32 else 0)
        pairs_BGI2[tile, :, place, 0] = scales_FG[row]
        pairs_BGI2[tile, :, place, 1] = zeros_FG[row]
    groups_D = torch.arange(num_in) // group
    zeros_FD = zeros_FG.double()[:, groups_D]
    scaled_FD = (codes_FD.double() - 8) * scales_FG.double()[:, groups_D]
    matrix = PackedMatrix(
        form="int4", parts=(codes_BDC, pairs_BGI2), shape=(num_out, num_in), group=group
    )
    return matrix, scaled_FD + zeros_FD, scaled_FD.abs() + zeros_FD.abs()

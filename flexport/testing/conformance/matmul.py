"""Laws of `matmul`, on plain weights and on packed ones.

Dimension key: T tokens, D features in, F features out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flexport.backend import Backend, PacksWeights
from flexport.testing.conformance.problems import Product
from flexport.testing.conformance.tensors import dtypes_of, on_host, placed, some

__all__ = ["MatmulLaws"]

# Some kernels have a path of their own for few rows, for widths that fill no register, ...
MATMUL_SHAPES = [
    (1, 8, 8),
    (1, 64, 37),
    (1, 256, 512),
    (1, 1, 1),
    (3, 5, 7),
    (7, 1, 9),
    (9, 33, 1),
    (16, 128, 33),
    (65, 96, 130),
    (300, 64, 48),
    (2, 2048, 1024),
    (4097, 32, 24),
    (0, 16, 8),
]


class MatmulLaws:
    """x @ weight.T + bias, however the three lie and whatever came before."""

    @pytest.mark.parametrize("shape", MATMUL_SHAPES, ids=str)
    @pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
    def test_matmul_is_accurate(
        self, backend: Backend, shape: tuple[int, int, int], with_bias: bool
    ) -> None:
        for dtype in dtypes_of(backend):
            problem = Product.draw(shape, dtype, with_bias=with_bias)

            problem.check(on_host(backend, problem.run(backend)))

    @pytest.mark.parametrize("shape", MATMUL_SHAPES, ids=str)
    @pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
    def test_matmul_on_a_packed_weight_is_accurate(
        self, backend: Backend, shape: tuple[int, int, int], with_bias: bool
    ) -> None:
        if not isinstance(backend, PacksWeights):
            pytest.skip("this backend does not pack weights")
        for dtype in dtypes_of(backend):
            problem = Product.draw(shape, dtype, with_bias=with_bias)
            x_TD, weight_FD, bias_F = problem.on_device(backend)
            packed_FD = backend.pack(weight_FD)
            del weight_FD

            for _ in range(2):
                problem.check(on_host(backend, backend.matmul(x_TD, packed_FD, bias_F)))

    def test_a_packed_weight_may_have_been_a_view(self, backend: Backend) -> None:
        if not isinstance(backend, PacksWeights):
            pytest.skip("this backend does not pack weights")
        for dtype in dtypes_of(backend):
            problem = Product.draw((5, 24, 10), dtype)
            x_TD, weight_FD, _ = problem.on_device(backend)
            flat = backend.allocate((weight_FD.numel() + 3,), dtype)
            backend.copy_async(weight_FD, flat[3:].view(weight_FD.shape)).wait()

            packed_FD = backend.pack(flat[3:].view(weight_FD.shape))

            problem.check(on_host(backend, backend.matmul(x_TD, packed_FD)))

    @pytest.mark.parametrize("skip", [1, 3, 8])
    def test_matmul_takes_views_of_larger_tensors(self, backend: Backend, skip: int) -> None:
        for dtype in dtypes_of(backend):
            problem = Product.draw((5, 24, 10), dtype, with_bias=True)
            x_TD, weight_FD, bias_F = problem.on_device(backend)
            assert bias_F is not None
            flat = backend.allocate((weight_FD.numel() + bias_F.numel() + 2 * skip,), dtype)
            shifted_FD = flat[skip:][: weight_FD.numel()].view(weight_FD.shape)
            shifted_F = flat[-bias_F.numel() :]
            backend.copy_async(weight_FD, shifted_FD).wait()
            backend.copy_async(bias_F, shifted_F).wait()
            wide = backend.allocate((5, 48), dtype)
            backend.copy_async(x_TD, wide[:, 7:31]).wait()

            out_TF = backend.matmul(wide[:, 7:31], shifted_FD, shifted_F)

            problem.check(on_host(backend, out_TF))

    def test_matmul_takes_rows_that_are_columns_in_memory(self, backend: Backend) -> None:
        for dtype in dtypes_of(backend):
            problem = Product.draw((33, 24, 10), dtype, with_bias=True)
            _, weight_FD, bias_F = problem.on_device(backend)
            x_DT = placed(backend, problem.x_TD.T)

            out_TF = backend.matmul(x_DT.T, weight_FD, bias_F)

            problem.check(on_host(backend, out_TF))

    def test_matmul_takes_every_other_row(self, backend: Backend) -> None:
        for dtype in dtypes_of(backend):
            problem = Product.draw((34, 24, 10), dtype)
            x_TD, weight_FD, _ = problem.on_device(backend)

            out_TF = backend.matmul(x_TD[::2], weight_FD)

            replace(problem, x_TD=problem.x_TD[::2]).check(on_host(backend, out_TF))

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_row_that_is_not_finite_spoils_itself_alone(
        self, backend: Backend, bad: float
    ) -> None:
        for shape in ((5, 48, 33), (70, 64, 64)):
            problem = Product.draw(shape, torch.float32, with_bias=True)
            x_TD, weight_FD, bias_F = problem.on_device(backend)
            x_TD[2] = bad

            found_TF = on_host(backend, backend.matmul(x_TD, weight_FD, bias_F))

            assert not bool(found_TF[2].isfinite().any())
            others = [row for row in range(shape[0]) if row != 2]
            replace(problem, x_TD=problem.x_TD[others]).check(found_TF[others])

    def test_matmul_leaves_its_arguments_as_they_were(self, backend: Backend) -> None:
        problem = Product.draw((9, 32, 17), torch.float32, with_bias=True)
        operands = problem.on_device(backend)

        backend.matmul(*operands)

        for after, before in zip(
            operands, (problem.x_TD, problem.weight_FD, problem.bias_F), strict=True
        ):
            assert after is not None and before is not None
            assert torch.equal(on_host(backend, after), before)

    def test_every_product_has_memory_of_its_own(self, backend: Backend) -> None:
        problems = [
            Product.draw((9, 32, 17), torch.float32, with_bias=True, seed=n) for n in range(8)
        ]
        problems.append(Product.draw((0, 32, 17), torch.float32))

        results = [problem.run(backend) for problem in problems]
        for problem, out_TF in zip(problems, results, strict=True):
            problem.check(on_host(backend, out_TF))

        results[0].fill_(math.nan)
        problems[1].check(on_host(backend, results[1]))
        problems[0].check(on_host(backend, problems[0].run(backend)))

    def test_a_product_takes_its_operands_as_they_are_when_it_is_issued(
        self, backend: Backend
    ) -> None:
        problem = Product.draw((64, 128, 96), torch.float32)
        x_TD, weight_FD, _ = problem.on_device(backend)

        weight_FD.mul_(2)
        doubled_TF = backend.matmul(x_TD, weight_FD)
        weight_FD.mul_(0.5)
        out_TF = backend.matmul(x_TD, weight_FD)
        x_TD.zero_()
        weight_FD.zero_()

        problem.check(on_host(backend, out_TF))
        problem.check(on_host(backend, doubled_TF * 0.5))

    def test_products_accumulate_in_float32_or_better(self, backend: Backend) -> None:
        """In a shorter dtype 1024 ones and then small numbers would stay 1024."""
        for dtype in dtypes_of(backend):
            x_TD = torch.ones(3, 2048, dtype=dtype)
            weight_FD = torch.cat([torch.ones(2, 1024), torch.full((2, 1024), 2.0**-6)], 1)
            problem = Product(x_TD=x_TD, weight_FD=weight_FD.to(dtype), bias_F=None)

            problem.check(on_host(backend, problem.run(backend)))

    def test_the_features_of_a_result_can_be_cut_into_heads(self, backend: Backend) -> None:
        data = some((5, 12), torch.float32)
        out_TF = backend.matmul(placed(backend, data), placed(backend, torch.eye(12)))

        heads_THE = out_TF.unflatten(-1, (3, 4))

        assert torch.equal(
            on_host(backend, heads_THE.contiguous()), on_host(backend, out_TF).view(5, 3, 4)
        )

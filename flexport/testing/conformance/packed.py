"""Laws of the optional power `MultipliesPacked`, for what a backend says that it multiplies.

Dimension key: T tokens, D features in, F features out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from flexport.backend import Backend, MultipliesPacked
from flexport.testing.conformance.packed_problems import (
    MultiplyingBackend,
    PackedProduct,
    Sizes,
    placed_matrix,
)
from flexport.testing.conformance.tensors import on_host, placed, some

__all__ = ["PackedLaws"]

INT8 = Sizes("int8", 0, 96, 256)

INT4 = Sizes("int4", 64, 96, 256)

ONE_OF_EACH = [INT8, INT4]

# Rows that fill no tile, features that fill no group or register, ...
MATRICES = [
    *ONE_OF_EACH,
    Sizes("int8", 0, 37, 64),
    Sizes("int8", 0, 130, 67),
    Sizes("int8", 0, 64, 2048),
    Sizes("int4", 32, 64, 64),
    Sizes("int4", 32, 37, 80),
    Sizes("int4", 64, 120, 200),
    Sizes("int4", 64, 64, 40),
    Sizes("int4", 64, 65, 67),
    Sizes("int4", 128, 192, 1024),
    Sizes("int4", 128, 130, 144),
    Sizes("int4", 256, 64, 520),
]

TOKENS = [0, 1, 7, 65, 300]


def _within_a_larger_one(backend: Backend, x_TD: Tensor) -> Tensor:
    num_tokens, size = x_TD.shape
    wide = placed(backend, some((num_tokens, size + 24), x_TD.dtype))
    backend.copy_async(placed(backend, x_TD), wide[:, 7 : 7 + size]).wait()
    return wide[:, 7 : 7 + size]


VIEWS: dict[str, Callable[[Backend, Tensor], Tensor]] = {
    "some of a larger one's features": _within_a_larger_one,
    "columns in memory": lambda backend, x_TD: placed(backend, x_TD.T).T,
    "every other row": lambda backend, x_TD: placed(backend, x_TD.repeat_interleave(2, 0))[::2],
}

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

each_form = pytest.mark.parametrize("sizes", ONE_OF_EACH, ids=str)


class PackedLaws:
    """x @ matrix.T + bias, with matrices as they are packed."""

    @pytest.mark.parametrize("sizes", MATRICES, ids=str)
    def test_a_product_with_a_packed_matrix_is_accurate(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, *TOKENS):
            for with_bias in (False, True):
                problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=with_bias)

                problem.check(problem.run(multiplying))

    @pytest.mark.parametrize("view", VIEWS)
    @each_form
    def test_a_product_with_a_packed_matrix_takes_views(
        self, backend: Backend, sizes: Sizes, view: str
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 9):
            problem = PackedProduct.draw(sizes, num_tokens, dtype)
            x_TD, matrix = VIEWS[view](backend, problem.x_TD), problem.on_device(backend)[1]

            (out_TF,) = multiplying.matmul_packed(x_TD, [matrix], [None])

            problem.check(on_host(backend, out_TF))

    @pytest.mark.parametrize(
        "sizes", [Sizes("int8", 0, 96, 2048), Sizes("int4", 64, 96, 2048)], ids=str
    )
    def test_a_token_with_one_huge_feature_is_as_accurate_as_others(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        """Large models have features that are 60 times the others (arXiv:2208.07339, section 3.2).

        Rounded to 8 bits with a step for the largest, the others would be off by an eighth.
        """
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 9):
            problem = PackedProduct.draw(sizes, num_tokens, dtype)
            lengths_T = problem.x_TD.double().norm(dim=1)
            problem.x_TD[::2, 3] = 60 * problem.x_TD[::2].float().std(1).to(dtype)

            problem.check(problem.run(multiplying), lengths_T=lengths_T)

    @each_form
    def test_a_token_of_zeros_gives_the_bias(self, backend: Backend, sizes: Sizes) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 3):
            problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
            problem.x_TD[1] = 0

            out_TF = problem.run(multiplying)

            assert problem.bias_F is not None
            assert torch.equal(out_TF[1], problem.bias_F)
            problem.check(out_TF)

    @each_form
    def test_a_tokens_packed_product_does_not_depend_on_its_neighbours(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 9):
            problem = PackedProduct.draw(sizes, num_tokens, dtype)
            problem.x_TD[1::2, 7] *= 60
            found_TF = problem.run(multiplying)

            for token in range(9):
                alone = replace(problem, x_TD=problem.x_TD[token : token + 1])

                alone.check_same(found_TF[token : token + 1], alone.run(multiplying))

    @each_form
    def test_packed_matrices_together_give_what_each_gives_alone(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 5):
            problems = [
                PackedProduct.draw(
                    sizes._replace(num_out=num_out),
                    num_tokens,
                    dtype,
                    with_bias=num_out != 64,
                    seed=num_out,
                )
                for num_out in (96, 64, 130)
            ]
            problems = [replace(problem, x_TD=problems[0].x_TD) for problem in problems]
            _, matrices, biases = zip(*(each.on_device(backend) for each in problems), strict=True)

            found = multiplying.matmul_packed(placed(backend, problems[0].x_TD), matrices, biases)

            for problem, out_TF in zip(problems, found, strict=True):
                problem.check_same(on_host(backend, out_TF), problem.run(multiplying))

    @each_form
    def test_a_settled_matrix_gives_what_it_gave_unsettled(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
            x_TD, matrix, bias_F = problem.on_device(backend)
            settled = multiplying.settle(matrix, dtype)
            if settled is None:
                pytest.skip(f"this backend multiplies {sizes.form} as it lies")

            for _ in range(2):
                together = multiplying.matmul_packed(
                    x_TD, [settled, matrix, settled], [bias_F, bias_F, None]
                )
                found = [on_host(backend, out_TF) for out_TF in together]
                problem.check(found[0])
                problem.check_same(found[0], found[1])
                replace(problem, bias_F=None).check(found[2])

    @pytest.mark.parametrize("sizes", MATRICES, ids=str)
    def test_a_settled_matrix_takes_any_number_of_tokens(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        """In whatever dtype it was settled for, since it is never decoded."""
        multiplying = _multiplying(backend)
        matrix = placed_matrix(backend, PackedProduct.draw(sizes, 0, torch.float32).matrix)
        settled_for = [(dtype, multiplying.settle(matrix, dtype)) for dtype in DTYPES]
        cases = [(*each, num_tokens) for each in settled_for for num_tokens in TOKENS if each[1]]
        if not cases:
            pytest.skip(f"this backend multiplies {sizes.form} as it lies, if at all")
        for dtype, settled, num_tokens in cases:
            assert settled is not None
            problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
            x_TD, _, bias_F = problem.on_device(backend)

            (out_TF,) = multiplying.matmul_packed(x_TD, [settled], [bias_F])

            problem.check(on_host(backend, out_TF))

    @each_form
    def test_a_settled_matrix_has_memory_of_its_own(self, backend: Backend, sizes: Sizes) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            problem = PackedProduct.draw(sizes, num_tokens, dtype)
            x_TD, matrix, _ = problem.on_device(backend)
            settled = multiplying.settle(matrix, dtype)
            if settled is None:
                pytest.skip(f"this backend multiplies {sizes.form} as it lies")

            for part in matrix.parts:
                part.fill_(77)
            (out_TF,) = multiplying.matmul_packed(x_TD, [settled], [None])

            problem.check(on_host(backend, out_TF))

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @each_form
    def test_a_token_that_is_not_finite_spoils_its_own_packed_product_alone(
        self, backend: Backend, sizes: Sizes, bad: float
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            for where in (slice(None), 5):
                problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
                problem.x_TD[2, where] = bad

                found_TF = problem.run(multiplying)

                assert not bool(found_TF[2].isfinite().any())
                others = [row for row in range(7) if row != 2]
                replace(problem, x_TD=problem.x_TD[others]).check(found_TF[others])

    @each_form
    def test_a_packed_product_leaves_its_arguments_as_they_were(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
            x_TD, matrix, bias_F = problem.on_device(backend)

            multiplying.settle(matrix, dtype)
            multiplying.matmul_packed(x_TD, [matrix], [bias_F])

            afterwards = [x_TD, bias_F, *matrix.parts]
            beforehand = [problem.x_TD, problem.bias_F, *problem.matrix.parts]
            for after, before in zip(afterwards, beforehand, strict=True):
                assert after is not None and before is not None
                # As bytes, since rows that belong to nothing may hold NaN.
                assert torch.equal(
                    on_host(backend, after).view(torch.uint8), before.view(torch.uint8)
                )

    @each_form
    def test_every_packed_product_has_memory_of_its_own(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            problem = PackedProduct.draw(sizes, num_tokens, dtype, with_bias=True)
            x_TD, matrix, bias_F = problem.on_device(backend)

            results = [
                out_TF
                for _ in range(2)
                for out_TF in multiplying.matmul_packed(x_TD, [matrix] * 2, [bias_F] * 2)
            ]
            for number, out_TF in enumerate(results):
                problem.check(on_host(backend, out_TF))
                results[number].fill_(math.nan)

            problem.check(problem.run(multiplying))

    @each_form
    def test_packed_products_work_in_inference_mode_and_then_outside_it(
        self, backend: Backend, sizes: Sizes
    ) -> None:
        for multiplying, dtype, num_tokens in _asked(backend, sizes, 7):
            problem = PackedProduct.draw(sizes, num_tokens, dtype)
            with torch.inference_mode():
                x_TD, matrix, _ = problem.on_device(backend)
                settled = multiplying.settle(matrix, dtype) or matrix
                first_TF, _ = multiplying.matmul_packed(x_TD, [matrix, settled], [None, None])
                problem.check(on_host(backend, first_TF))

            for out_TF in multiplying.matmul_packed(x_TD, [settled, matrix], [None, None]):
                problem.check(on_host(backend, out_TF))

    def test_a_form_that_nobody_knows_is_not_multiplied(self, backend: Backend) -> None:
        """So that the core may bring forms that are younger than a backend."""
        multiplying = _multiplying(backend)

        for dtype in DTYPES:
            assert not multiplying.multiplies("a form of the future", dtype, 1)


def _multiplying(backend: Backend) -> MultiplyingBackend:
    if not isinstance(backend, MultipliesPacked):
        pytest.skip("this backend does not multiply packed matrices")
    return cast(MultiplyingBackend, backend)


def _asked(
    backend: Backend, sizes: Sizes, *tokens: int
) -> list[tuple[MultiplyingBackend, torch.dtype, int]]:
    """Each dtype and number of tokens for which it multiplies; skips the test where there is none.

    In dtypes that it does not list, too: users may ask for any.
    """
    multiplying = _multiplying(backend)
    asked = [
        (multiplying, dtype, num_tokens)
        for dtype in DTYPES
        for num_tokens in tokens
        if multiplying.multiplies(sizes.form, dtype, num_tokens)
    ]
    if not asked:
        pytest.skip(f"this backend has {sizes.form} decoded")
    return asked

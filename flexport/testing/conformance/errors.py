"""Laws of what goes wrong: it is told, it is told once, and the backend goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from flexport.backend import Backend
from flexport.testing.conformance.problems import AttentionCase, AttentionProblem, Product
from flexport.testing.conformance.tensors import (
    PATHS,
    SOME_TEXT,
    Place,
    in_threads,
    on_host,
    placed,
    some,
)

__all__ = ["ErrorLaws"]

MISMATCHES = {
    "fewer items": ((3,), torch.float32, (4,), torch.float32),
    "one for all": ((1,), torch.float32, (4,), torch.float32),
    "a row for all rows": ((3,), torch.float32, (2, 3), torch.float32),
    "another order": ((2, 3), torch.float32, (3, 2), torch.float32),
    "flattened": ((2, 3), torch.float32, (6,), torch.float32),
    "a narrower dtype": ((4,), torch.float32, (4,), torch.bfloat16),
    "a dtype of one size": ((4,), torch.bfloat16, (4,), torch.float16),
}
"""(source's shape, its dtype, destination's shape, its dtype): torch itself would copy most."""


class ErrorLaws:
    """Copies that can't be, products that can't be, and what comes after them."""

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    @pytest.mark.parametrize("mismatch", MISMATCHES.values(), ids=MISMATCHES.keys())
    def test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once(
        self,
        backend: Backend,
        mismatch: tuple[tuple[int, ...], torch.dtype, tuple[int, ...], torch.dtype],
        src: Place,
        dst: Place,
    ) -> None:
        src_shape, src_dtype, dst_shape, dst_dtype = mismatch
        source = placed(backend, some(src_shape, src_dtype), src)
        before = some(dst_shape, dst_dtype, seed=1)
        target = placed(backend, before, dst)

        try:
            ticket = backend.copy_async(source, target)
        except Exception:  # noqa: BLE001
            told: tuple[Callable[[], None], ...] = ()  # at once, which is better still
        else:
            told = (ticket.wait, ticket.join, backend.sync)

        for tell in told:
            with pytest.raises(Exception, match=SOME_TEXT):
                tell()

        backend.sync()
        assert torch.equal(on_host(backend, target), before)

    def test_an_error_is_told_by_every_join_of_its_ticket(self, backend: Backend) -> None:
        source, target = (placed(backend, torch.ones(n)) for n in (3, 4))
        try:
            ticket = backend.copy_async(source, target)
        except Exception:  # noqa: BLE001
            return  # there is no ticket

        def work(_: int) -> None:
            with pytest.raises(Exception, match=SOME_TEXT):
                ticket.join()

        in_threads(work)

    def test_an_error_is_its_own_copys_and_no_others(self, backend: Backend) -> None:
        data = some((64,), torch.float32)
        source = placed(backend, data, "host")
        targets = [backend.allocate((64,), torch.float32) for _ in range(4)]

        tickets = [backend.copy_async(source, target) for target in targets[:2]]
        with pytest.raises(Exception, match=SOME_TEXT):
            backend.copy_async(source, backend.allocate((65,), torch.float32)).join()
        tickets += [backend.copy_async(source, target) for target in targets[2:]]

        for ticket, target in zip(tickets, targets, strict=True):
            ticket.join()
            assert torch.equal(on_host(backend, target), data)

    def test_a_product_of_unlike_sizes_is_an_error(self, backend: Backend) -> None:
        x_TD, weight_FD = placed(backend, torch.ones(2, 3)), placed(backend, torch.ones(4, 5))

        with pytest.raises(Exception, match=SOME_TEXT):
            on_host(backend, backend.matmul(x_TD, weight_FD))

    def test_after_an_error_the_backend_goes_on(self, backend: Backend) -> None:
        product = Product.draw((9, 32, 17), torch.float32, with_bias=True)
        attention = AttentionProblem.draw(AttentionCase(pages=(8, 8), length=11, queries=2))
        for _ in range(3):
            with pytest.raises(Exception, match=SOME_TEXT):
                backend.copy_async(
                    placed(backend, torch.ones(3), "host"), placed(backend, torch.ones(4))
                ).join()
        try:
            backend.sync()
        except Exception:  # noqa: BLE001
            backend.sync()  # it was told by the call before

        product.check(on_host(backend, product.run(backend)))
        attention.check(on_host(backend, attention.run(backend)))

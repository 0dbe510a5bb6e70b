"""Backends that keep errors to themselves, or never forget them."""

from __future__ import annotations

from typing import Any

from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Told, breaks
from flexport.backend import Ticket
from flexport.testing import DiscreteBackend


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class ConvertsSilently(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        if src.shape == dst.shape:
            src = src.to(dst.dtype)
        return super().copy_async(src, dst)


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class ForgetsErrorsAtSync(DiscreteBackend):
    def sync(self) -> None:
        self._failed.clear()
        super().sync()


@breaks("test_a_copy_between_unlike_tensors_is_an_error_that_is_told_once")
class TellsErrorsForEver(DiscreteBackend):
    def sync(self) -> None:
        failed = self._failed[:]
        try:
            super().sync()
        finally:
            self._failed += failed


@breaks("test_an_error_is_told_by_every_join_of_its_ticket")
class TellsOneJoinerAlone(DiscreteBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        ticket: Any = super().copy_async(src, dst)
        left = [ticket]
        return Told(lambda: left.pop().join() if left else None)


@breaks("test_an_error_is_its_own_copys_and_no_others", "test_after_an_error_the_backend_goes_on")
class NeverRecovers(ToasterBackend):
    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        try:
            return super().copy_async(src, dst)
        except ValueError:
            self._is_open = False
            raise


@breaks("test_a_product_of_unlike_sizes_is_an_error")
class MultipliesWhatThereIs(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return super().matmul(x_TD, weight_FD[:, : x_TD.shape[1]], bias_F)

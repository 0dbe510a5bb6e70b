"""Backends whose verbs do not go together."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import Late, Place, breaks


@breaks("test_plain_torch_works_on_device_tensors", "test_plain_torch_and_kernels_keep_their_order")
class KnowsItsOwnVerbsOnly(ToasterBackend):
    def allocate(self, shape: Sequence[int], dtype: torch.dtype, where: Place = "device") -> Tensor:
        tensor = super().allocate(shape, dtype, where)
        return tensor.as_subclass(Opaque) if where == "device" else tensor


class Opaque(Tensor):
    """A tensor that takes part in few operations."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sqrt, Tensor.sqrt, Tensor.__add__, Tensor.add):
            raise NotImplementedError(f"{func} is not implemented for this device")
        plain: Any = super().__torch_function__
        return plain(func, types, args, kwargs or {})


@breaks("test_kernels_work_in_inference_mode_and_then_outside_it")
class KeepsABufferOfInferenceMode(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        buffers = self.__dict__.setdefault("buffers", {})
        buffer_TD = buffers.setdefault(threading.get_ident(), torch.empty_like(x_TD))
        return super().matmul(buffer_TD.copy_(x_TD), weight_FD, bias_F)


@breaks("test_verbs_may_be_called_from_many_threads")
class LetsOneThreadIn(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("this thread has no context")
        return super().matmul(x_TD, weight_FD, bias_F)


@breaks("test_results_of_one_thread_are_read_in_another")
class TakesResultsBackWithTheThread(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        if threading.current_thread() is not threading.main_thread():
            weakref.finalize(threading.current_thread(), out_TF.fill_, math.nan)
        return out_TF


@breaks("test_close_may_be_called_twice_and_ends_the_other_verbs")
class WorksOnWhenClosed(ToasterBackend):
    def sync(self) -> None:
        pass


@breaks("test_close_ends_well_with_copies_under_way")
class ClosesInTheMiddle(Late):
    def close(self) -> None:
        if any(lane._waiting for lane in self._lanes.values()):
            raise RuntimeError("copies are under way")
        super().close()

"""The five verbs on a toaster: a little memory of its own, and all work done when a verb returns."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from flexport.backend import AttentionSpec, Capabilities, Ticket
from flexport.errors import OutOfMemory
from flexport.torch_ops.attention import attention

__all__ = ["ToasterBackend"]


class ToasterBackend:
    """A device whose tensors happen to be torch's CPU tensors; its memory is hard."""

    def __init__(self, memory_bytes: int = 1 << 30) -> None:
        self._capabilities = Capabilities(
            name="toaster (two slots)",
            memory_bytes=memory_bytes,
            unified=False,
            dtypes=("float32",),
            dtype_reason="bread knows no other",
            page_tokens=16,
        )
        # Re-entrant: the collector may run a finalizer in the thread that holds it.
        self._lock = threading.RLock()
        self._free_bytes = memory_bytes
        self._is_open = True

    @property
    def capabilities(self) -> Capabilities:
        """What the core may know of a toaster."""
        return self._capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """A tensor in memory that is counted until the last view of it goes."""
        self._must_be_open("allocate")
        num_bytes = math.prod(shape) * dtype.itemsize
        if where == "device":
            self._give(-num_bytes)
        try:
            memory = _Memory(max(1, num_bytes))
        except (MemoryError, OverflowError) as error:
            if where == "device":
                self._give(num_bytes)
            raise OutOfMemory(f"asked for {num_bytes} bytes of {where} memory: {error}") from error
        if where == "device":
            weakref.finalize(memory, self._give, num_bytes).atexit = False
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            bytes_B = torch.frombuffer(memory, dtype=torch.uint8)
            return bytes_B[:num_bytes].view(dtype).view(tuple(shape))

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Copy at once; so there is nothing to hold, to order, or to tell later."""
        self._must_be_open("copy_async")
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"a copy needs one shape and dtype: source has {tuple(src.shape)} {src.dtype}, "
                f"destination {tuple(dst.shape)} {dst.dtype}"
            )
        # A tensor made in inference mode can be written to only in it.
        with torch.inference_mode():
            dst.copy_(src)
        return _Done()

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias."""
        self._must_be_open("matmul")
        return functional.linear(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Softmax attention over pages, in plain torch."""
        self._must_be_open("attention")
        return attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def sync(self) -> None:
        """All is done already."""
        self._must_be_open("sync")

    def close(self) -> None:
        """Pull the plug; may be called twice."""
        self._is_open = False

    def _give(self, num_bytes: int) -> None:
        """Add to what is free, or take away from it. Raises OutOfMemory."""
        with self._lock:
            if self._free_bytes + num_bytes < 0:
                raise OutOfMemory(
                    f"asked for {-num_bytes} bytes of device memory, {self._free_bytes} of "
                    f"{self._capabilities.memory_bytes} are free"
                )
            self._free_bytes += num_bytes

    def _must_be_open(self, verb: str) -> None:
        if not self._is_open:
            raise RuntimeError(f"{verb} was called on a toaster that is closed")


class _Memory(bytearray):
    """Bytes of one allocation; a plain bytearray could not be watched by a weak reference."""


class _Done:
    """The ticket of a copy that is over."""

    def wait(self) -> None:
        """Nothing is left to wait for."""

    join = wait

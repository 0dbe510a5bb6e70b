"""The five verbs on a card.

Kernels run on the card's default stream, copies on streams of their own (`streams`), host memory
is pinned (`pinned`). All verbs may be called from any thread whose current stream is the default
one, as it is unless somebody changed it.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Capabilities, Ticket
from flexport.errors import OutOfMemory
from flexport.torch_ops.attention import forget
from flexport_cuda import kernels
from flexport_cuda.facts import facts, memory_cap_bytes
from flexport_cuda.pinned import HostMemory, pinned_bound_bytes
from flexport_cuda.runtime import Runtime, TorchRuntime
from flexport_cuda.streams import Copies

__all__ = ["CudaBackend"]

_T = TypeVar("_T")


class CudaBackend:
    """The five verbs on one card."""

    def __init__(self, runtime: Runtime) -> None:
        """Takes the runtime over, to the point of closing it."""
        self._runtime = runtime
        cap_bytes = memory_cap_bytes()
        if cap_bytes is not None:
            runtime.limit_memory(cap_bytes)
        dtypes, dtype_reason = runtime.dtypes
        free_bytes, _, _ = runtime.memory()
        self._capabilities = facts(runtime.name, dtypes, dtype_reason, free_bytes=free_bytes)
        self._host = HostMemory(runtime.register, runtime.unregister, pinned_bound_bytes())
        self._copies = Copies(runtime)
        self._closed = False

    @classmethod
    def open(cls, index: int | None = None) -> CudaBackend:
        """The card of that number; None is the one that torch takes by default."""
        return cls(TorchRuntime(index))

    @property
    def capabilities(self) -> Capabilities:
        """What this card is good at, and the memory that was free when it was opened."""
        return self._capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """An uninitialised, contiguous tensor on the card, or in pinned host memory."""
        self._check("allocate")
        if where == "host":
            return self._host.allocate(shape, dtype)

        def make() -> Tensor:
            # A tensor born in inference mode could not be written to outside it.
            with torch.inference_mode(False):
                return torch.empty(tuple(shape), dtype=dtype, device=self._runtime.device)

        num_bytes = math.prod(shape) * dtype.itemsize
        return self._with_memory(f"allocate was asked for {num_bytes} bytes", make)

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Start the copy in the stream of its direction; errors of the card show at `join`."""
        self._check("copy_async")
        return self._with_memory(
            f"copy_async was given {tuple(src.shape)} {src.dtype}",
            lambda: self._copies.start(src, dst),
        )

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias."""
        self._check("matmul")
        return self._with_memory(
            f"matmul was given {tuple(x_TD.shape)} and {tuple(weight_FD.shape)}",
            lambda: kernels.matmul(x_TD, weight_FD, bias_F),
        )

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Softmax attention over paged keys and values; see `flexport_cuda.kernels`."""
        self._check("attention")
        return self._with_memory(
            f"attention was given queries {tuple(q_NHLE.shape)} and {spec.length} columns",
            lambda: kernels.attention(
                q_NHLE, keys_NKGE, values_NKGE, spec, self._runtime.has_fused_groups
            ),
        )

    def sync(self) -> None:
        """Block until the card has nothing to do; raises what went wrong on it."""
        self._must_be_open("sync")
        self._runtime.synchronize()
        self._copies.reap()

    def close(self) -> None:
        """Finish the copies and unpin host memory (of tensors that live, when they end)."""
        if self._closed:
            return
        self._closed = True
        forget()
        try:
            self._copies.finish()
        finally:
            self._host.close()
            self._runtime.close()

    def _with_memory(self, asked: str, work: Callable[[], _T]) -> _T:
        """What `work` gives; if there is no memory for it, once more with all that can be freed."""
        try:
            return work()
        except torch.OutOfMemoryError:
            pass  # outside, where the error holds no tensors of the failed try
        self._copies.finish()
        self._runtime.empty_cache()
        try:
            return work()
        except torch.OutOfMemoryError as error:
            free_bytes, total_bytes, used_bytes = self._runtime.memory()
            raise OutOfMemory(
                f"{asked}: {free_bytes} of the {total_bytes} bytes of {self._runtime.name} are "
                f"free, this process has tensors of {used_bytes}; use less --device-memory. "
                f"torch says: {error}"
            ) from error

    def _check(self, verb: str) -> None:
        self._must_be_open(verb)
        if not self._runtime.computes_in_order:
            raise RuntimeError(
                f"{verb} was called where another stream than the default one of "
                f"{self._runtime.device} is current; its work would not be in order with copies"
            )

    def _must_be_open(self, verb: str) -> None:
        if self._closed:
            raise RuntimeError(f"{verb} was called on a CUDA backend that is closed")

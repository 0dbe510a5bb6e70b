"""The CPU as a backend: device memory is host memory, and work is done when a verb returns.

Copies run at once in the calling thread: they and the kernels share the same cores and the same
memory, so a thread of their own would make nothing faster. All verbs may be called from any
thread.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Capabilities, PackedMatrix, Ticket
from flexport_cpu import memory, packed
from flexport_cpu.attention import attention
from flexport_cpu.facts import facts
from flexport_cpu.linear import linear, onednn_says, pack
from flexport_cpu.page_products import HAS_BAGS
from flexport_cpu.processor import choose_dtypes, processor_flags, processor_name

__all__ = ["CpuBackend"]


class CpuBackend:
    """The five verbs on the CPU, weights laid out for its kernels, and products with packed ones."""

    def __init__(self) -> None:
        dtypes, reason = choose_dtypes(
            processor_flags(),
            onednn_says("_is_mkldnn_bf16_supported"),
            onednn_says("_is_mkldnn_fp16_supported"),
        )
        self._capabilities = replace(
            facts(),
            name=f"cpu ({processor_name()}, {torch.get_num_threads()} threads)",
            dtypes=dtypes,
            dtype_reason=reason,
            keys_by_feature=HAS_BAGS,
        )
        self._lock = threading.Lock()
        self._failed: list[Exception] = []
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """What this processor is good at, and the memory that was free when it was opened."""
        return self._capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """An uninitialised, contiguous tensor; "device" and "host" are the same memory."""
        self._must_be_open("allocate")
        return memory.allocate(shape, dtype)

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Copy at once; what went wrong, if anything, is in the ticket and in the next `sync`."""
        self._must_be_open("copy_async")
        try:
            if src.shape != dst.shape or src.dtype != dst.dtype:
                raise ValueError(
                    f"a copy needs one shape and dtype: source has {tuple(src.shape)} "
                    f"{src.dtype}, destination {tuple(dst.shape)} {dst.dtype}"
                )
            # A tensor made in inference mode can be written to only in it.
            with torch.inference_mode():
                dst.copy_(src)
        except Exception as error:  # noqa: BLE001 - whatever it is, the ticket hands it on
            with self._lock:
                self._failed.append(error)
            return _Done(error)
        return _OK

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias; `weight_FD` is plain, or what `pack` made of one."""
        self._must_be_open("matmul")
        return linear(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Softmax attention over paged keys and values; see `flexport_cpu.attention`."""
        self._must_be_open("attention")
        return attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def sync(self) -> None:
        """Work is done already; raises the first error of the copies since the last call."""
        self._must_be_open("sync")
        with self._lock:
            failed, self._failed = self._failed, []
        if failed:
            raise failed[0]

    def close(self) -> None:
        """End the use of this object; may be called twice."""
        self._closed = True

    def pack(self, weight_FD: Tensor) -> Tensor:
        """The weight in the layout of the matrix kernels, for weights that stay in memory."""
        self._must_be_open("pack")
        return pack(weight_FD)

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        """Whether the kernels of `flexport_cpu.packed` are quicker than decoding."""
        return packed.multiplies(form, dtype, num_tokens)

    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        """The matrix in the kernels' layout, for matrices that stay in memory."""
        self._must_be_open("settle")
        return packed.settle(matrix, dtype)

    def matmul_packed(
        self, x_TD: Tensor, matrices: Sequence[PackedMatrix], biases_F: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """Products with packed matrices; see `flexport_cpu.packed`."""
        self._must_be_open("matmul_packed")
        return packed.matmul_packed(x_TD, matrices, biases_F)

    def _must_be_open(self, verb: str) -> None:
        if self._closed:
            raise RuntimeError(f"{verb} was called on a CPU backend that is closed")


class _Done:
    """The ticket of a copy that is over, well or badly."""

    __slots__ = ("_error",)

    def __init__(self, error: Exception | None) -> None:
        self._error = error

    def wait(self) -> None:
        """Raise what the copy raised."""
        if self._error is not None:
            raise self._error

    join = wait


_OK = _Done(None)

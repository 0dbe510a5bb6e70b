"""The five verbs on an Apple GPU: one pool of memory, one queue, one thread in it at a time.

Device memory is the Mac's own, but the host can't address it: torch's MPS tensors have no host
pointer, DLPack gives Metal's handle instead (pytorch#180895), and the only way to one,
`torch.mps._host_alias_storage`, is private and recent (pytorch#180961), and asks for the whole
device to be synchronised before and after (its docstring). So what is read from disk is copied
once more.

Threads: torch encodes work into one command buffer, most of it from a queue of its own, but not
all: two threads that issue work may end the process (pytorch#197805, #197836).
All verbs take one lock. What the lock can't cover are torch operations on device tensors outside
of the verbs; the core has them in the one thread that also starts copies where memory is unified.
Other threads only join tickets, which touches no queue (see `copies`).

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Capabilities, Ticket
from flexport.errors import OutOfMemory
from flexport.torch_ops.attention import attention, forget
from flexport_mps.copies import Copies, wait_for
from flexport_mps.linear import MOST_FEATURES_IN, linear
from flexport_mps.machine import MARGIN_BYTES, MEMORY_VARIABLE, facts
from flexport_mps.runtime import Runtime

__all__ = ["MpsBackend"]

MOST_CACHED_BYTES = 256 << 20
"""Freed device memory that torch may keep while host memory is allocated: it is the same memory."""

_NO_ROOM = ("out of memory", "invalid buffer size")
"""What torch's MPS allocator says, in whatever exception (MPSAllocator.mm)."""


class MpsBackend:
    """The contract of `flexport.backend` on torch's MPS device."""

    def __init__(self, runtime: Runtime) -> None:
        """Raises ValueError for a FLEXPORT_MPS_MEMORY that is no size."""
        self._runtime = runtime
        self._lock = threading.RLock()
        self._copies = Copies(runtime)
        self._closed = False
        recommended_bytes = runtime.recommended_bytes()
        found = facts(recommended_bytes, runtime.free_bytes())
        self._capabilities = replace(found, name=f"mps ({runtime.name})")
        # What is free may grow; what the user has said, or Metal recommends, does not.
        is_lowered = bool(os.environ.get(MEMORY_VARIABLE, "").strip())
        cap_bytes = found.memory_bytes + MARGIN_BYTES if is_lowered else recommended_bytes
        runtime.set_cap(min(recommended_bytes, cap_bytes))

    @property
    def capabilities(self) -> Capabilities:
        """This GPU, and the memory that was free when it was opened."""
        return self._capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """An uninitialised, contiguous tensor. Raises OutOfMemory."""
        with self._verb("allocate"):
            if where == "host" and self._runtime.cached_bytes() > MOST_CACHED_BYTES:
                self._wait_for_all()  # or the next line would, with Python's lock held
                self._runtime.empty_cache()
            make = self._runtime.empty if where == "device" else self._runtime.empty_host
            try:
                # A tensor born in inference mode could not be written to outside it.
                with torch.inference_mode(False):
                    tensor = make(shape, dtype)
            except RuntimeError as error:
                num_bytes = math.prod(shape) * dtype.itemsize
                raise self._no_room(f"{num_bytes} bytes of {where} memory", error) from error
            expected = self._runtime.device.type if where == "device" else "cpu"
            if tensor.device.type != expected:
                raise RuntimeError(
                    f"torch gave memory on {tensor.device} where {where} memory was asked for "
                    "(pytorch#181374 is such a case); use another version of torch"
                )
            return tensor

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Start the copy behind all that was issued by now; see `flexport_mps.copies`."""
        with self._verb("copy_async"):
            return self._copies.start(src, dst)

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias; see `flexport_mps.linear`."""
        with self._verb("matmul"):
            return linear(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Softmax attention over paged keys and values, by `flexport.torch_ops.attention`.

        Not by torch's fused one, which on MPS was wrong for broadcast masks (pytorch#184180), drops
        NaN or makes it (#188147, #156707, #167515), and takes no pages. A page's columns are the
        length of a sum, so they are bounded as in `flexport_mps.linear`.
        """
        with self._verb("attention"):
            keys, values = (
                [part for page in pages for part in page.split(MOST_FEATURES_IN, dim=2)]
                for pages in (keys_NKGE, values_NKGE)
            )
            return attention(q_NHLE, keys, values, spec)

    def sync(self) -> None:
        """Block until everything issued so far is done."""
        with self._verb("sync"):
            self._wait_for_all()

    def close(self) -> None:
        """End the use of this object, once its copies are done; may be called twice."""
        with self._lock:
            if not self._closed:
                self._closed = True
                forget()
                self._wait_for_all()
                self._runtime.empty_cache()

    def _wait_for_all(self) -> None:
        wait_for(self._runtime.record())
        self._copies.let_go()

    @contextmanager
    def _verb(self, name: str) -> Iterator[None]:
        """One verb at a time, on an open backend, with torch's "no memory" in our words."""
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{name} was called on an MPS backend that is closed")
            try:
                yield
            except RuntimeError as error:
                if any(words in str(error).lower() for words in _NO_ROOM):
                    raise self._no_room(f"room for {name}", error) from error
                raise

    def _no_room(self, asked: str, error: RuntimeError) -> OutOfMemory:
        memory_bytes = self._capabilities.memory_bytes
        return OutOfMemory(
            f"asked for {asked}; about {self._runtime.free_bytes()} bytes are free, and "
            f"{memory_bytes} were when the device was opened: {error}"
        )

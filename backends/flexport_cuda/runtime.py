"""What the plug-in asks of torch.cuda, as a small protocol, so that tests can put another under it.

`TorchRuntime` is one card. Work runs on the card's default stream, which is where torch puts it
in every thread; the streams made here run beside it and are ordered by events alone.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch
from torch import Tensor

from flexport.errors import BackendUnavailable
from flexport_cuda.facts import amd_dtypes, nvidia_dtypes

__all__ = ["Event", "Runtime", "Stream", "TorchRuntime"]

PORTABLE = 1
"""cudaHostRegisterPortable: pinned for all cards of the process, not the current one alone."""


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether the stream has passed it."""

    def synchronize(self) -> None:
        """Block the calling thread until it has."""


class Stream(Protocol):
    """Device work in order."""

    def record(self) -> Event:
        """A point behind all work given by now."""

    def wait(self, event: Event) -> None:
        """Let work given from now on begin when that point, of whatever stream, is passed."""

    def copy(self, src: Tensor, dst: Tensor) -> None:
        """Give it dst[:] = src. It returns before that is done if host memory is pinned.

        The tensors have to live until then.
        """


class Runtime(Protocol):
    """One card."""

    @property
    def device(self) -> torch.device:
        """The card, as tensors name it."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def dtypes(self) -> tuple[tuple[str, ...], str]:
        """Those worth computing in, best first, and why."""

    @property
    def has_fused_groups(self) -> bool:
        """Whether torch's fused attention takes fewer key/value heads than query heads."""

    @property
    def compute(self) -> Stream:
        """Where kernels run."""

    @property
    def computes_in_order(self) -> bool:
        """Whether what this thread gives to torch now runs on `compute`."""

    def new_stream(self) -> Stream:
        """A stream beside it."""

    def synchronize(self) -> None:
        """Block until all streams are done; raises what went wrong on the card."""

    def memory(self) -> tuple[int, int, int]:
        """Bytes free on the card, bytes in all, and bytes that this process's tensors have."""

    def limit_memory(self, num_bytes: int) -> None:
        """Let this process take no more than that."""

    def empty_cache(self) -> None:
        """Give memory back that torch keeps for later."""

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin host memory; None if it is pinned, else why not."""

    def unregister(self, address: int) -> None:
        """Unpin what was pinned at this address."""

    def close(self) -> None:
        """Undo what was set for the whole process."""


class TorchRuntime:
    """A card, by torch.cuda."""

    def __init__(self, index: int | None = None) -> None:
        """The card of that number; None is torch's current one."""
        num_cards = torch.cuda.device_count()
        if index is not None and index >= num_cards:
            names = ", ".join(f"cuda:{number}" for number in range(num_cards)) or "none"
            raise BackendUnavailable(f"there is no cuda:{index}; there are: {names}")
        index = torch.cuda.current_device() if index is None else index
        self.device = torch.device("cuda", index)
        found = torch.cuda.get_device_properties(self.device)
        self.name = f"cuda:{index} ({found.name})"
        if torch.version.hip is None:
            self.dtypes = nvidia_dtypes(found.name, (found.major, found.minor))
        else:
            self.dtypes = amd_dtypes(found.name, found.gcnArchName)
        # The flash kernel, which takes them, needs Ampere; the older ones would repeat keys.
        self.has_fused_groups = "bfloat16" in self.dtypes[0]
        self._default = torch.cuda.default_stream(self.device)
        self.compute = _TorchStream(self._default)
        # The contract wants sums in float32; torch by default lets cuBLAS add up parts of a
        # product in half precision (docs/notes/cuda, "Reduced Precision Reduction").
        matmul = torch.backends.cuda.matmul
        self._before = (
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        )
        matmul.allow_bf16_reduced_precision_reduction = False
        matmul.allow_fp16_reduced_precision_reduction = False

    @property
    def computes_in_order(self) -> bool:
        """Whether this thread's current stream is the card's default one."""
        return bool(torch.cuda.current_stream(self.device) == self._default)

    def new_stream(self) -> Stream:
        """A stream that does not wait for the default one by itself."""
        return _TorchStream(torch.cuda.Stream(self.device))

    def synchronize(self) -> None:
        """Block until the card has nothing to do."""
        torch.cuda.synchronize(self.device)

    def memory(self) -> tuple[int, int, int]:
        """Bytes free on the card, bytes in all, and bytes that this process's tensors have."""
        free_bytes, total_bytes = torch.cuda.mem_get_info(self.device)
        return free_bytes, total_bytes, torch.cuda.memory_allocated(self.device)

    def limit_memory(self, num_bytes: int) -> None:
        """Make torch's allocator refuse what goes beyond."""
        _, total_bytes = torch.cuda.mem_get_info(self.device)
        share = min(1.0, num_bytes / total_bytes)
        torch.cuda.set_per_process_memory_fraction(share, self.device)

    def empty_cache(self) -> None:
        """Give memory back that torch keeps for later."""
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()

    def register(self, address: int, num_bytes: int) -> str | None:
        """Pin host memory; None if it is pinned, else why not."""
        with torch.cuda.device(self.device):
            runtime = torch.cuda.cudart()
            code = runtime.cudaHostRegister(address, num_bytes, PORTABLE)
            if code == runtime.cudaError.success:
                return None
            # The error stays pending in this thread until a kernel launch raises it, however
            # unrelated (vllm#50070 met that), and torch has no binding to clear it by.
            with contextlib.suppress(RuntimeError):
                torch.ones(1, device=self.device)
            return f"{runtime.cudaGetErrorString(code)} (error {int(code)})"

    def unregister(self, address: int) -> None:
        """Unpin what was pinned at this address."""
        with torch.cuda.device(self.device):
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))

    def close(self) -> None:
        """Put torch's settings back."""
        matmul = torch.backends.cuda.matmul
        (
            matmul.allow_bf16_reduced_precision_reduction,
            matmul.allow_fp16_reduced_precision_reduction,
        ) = self._before


class _TorchStream:
    """A stream of torch.cuda."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def record(self) -> Event:
        """An event; whoever waits for it sleeps, as other threads need the cores."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def wait(self, event: Event) -> None:
        """The host does not wait."""
        assert isinstance(event, torch.cuda.Event), event
        self._stream.wait_event(event)

    def copy(self, src: Tensor, dst: Tensor) -> None:
        """A copy in this stream; where a side is strided the host waits for it.

        torch copies strided tensors by way of contiguous ones, in pageable host memory, which end
        with the call (aten/src/ATen/native/cuda/Copy.cu); a copy that does not block may still be
        under way then ("might be synchronous" is all that CUDA's "API synchronization behavior"
        promises). Contiguous tensors are the caller's, who keeps them.
        """
        non_blocking = src.is_contiguous() and dst.is_contiguous()
        # A tensor made in inference mode can be written to only in it.
        with torch.cuda.stream(self._stream), torch.inference_mode():
            dst.copy_(src, non_blocking=non_blocking)

"""All that this plug-in asks of torch's MPS device, in one object that tests can replace.

Dimension key: B bytes.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexport_mps.machine import free_bytes

__all__ = ["Event", "Runtime", "TorchRuntime"]


class Event(Protocol):
    """A place in the device's queue."""

    def query(self) -> bool:
        """Whether all work issued before it is done. Touches no queue; for any thread."""


class Runtime(Protocol):
    """A device with one queue, in which everything runs in the order in which it was issued.

    No two threads may be in it at once, `Event.query` aside.
    """

    @property
    def device(self) -> torch.device:
        """Where device tensors say they are."""

    @property
    def name(self) -> str:
        """The processor, for people."""

    def recommended_bytes(self) -> int:
        """The most memory that the device should use."""

    def free_bytes(self) -> int:
        """What is free now of the memory that device and host share."""

    def set_cap(self, num_bytes: int) -> None:
        """Let allocations on the device fail beyond this, as far as the device can hold to it."""

    def cached_bytes(self) -> int:
        """Memory that no tensor uses and that torch keeps for the next ones."""

    def empty_cache(self) -> None:
        """Give such memory back. Nothing may be under way."""

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Device memory. Raises RuntimeError if there is none."""

    def empty_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory. Raises RuntimeError if there is none."""

    def copy(self, dst_B: Tensor, src_B: Tensor, *, non_blocking: bool) -> None:
        """Copy flat memory between host and device.

        A copy that does not block keeps nothing alive: source and destination have to outlive it.
        """

    def record(self) -> Event:
        """An event behind all that was issued by now, which is on its way to the device."""


class TorchRuntime:
    """torch.mps."""

    def __init__(self) -> None:
        """Raises RuntimeError if torch finds no GPU, or one that gives it no memory."""
        if not torch.backends.mps.is_available():
            built = "" if torch.backends.mps.is_built() else ", and was built without MPS"
            raise RuntimeError(
                f"torch {torch.__version__} finds no Metal GPU{built}; some sandboxes and "
                "processes without a session have none"
            )
        self.device = torch.device("mps")
        try:
            self.empty((1,), torch.uint8)
        except RuntimeError as error:
            # Virtual machines show a GPU and have none (actions/runner-images#9918).
            raise RuntimeError(
                "the Metal GPU gives torch no memory at all, as in a virtual machine, where Apple "
                f"does not support it: {error}"
            ) from error
        # Newer than the oldest torch that we work with.
        get_name = getattr(torch.backends.mps, "get_name", None)
        self.name: str = get_name() if get_name else platform.machine()

    def recommended_bytes(self) -> int:
        """Metal's recommendedMaxWorkingSetSize."""
        return torch.mps.recommended_max_memory()

    def free_bytes(self) -> int:
        """What macOS could give without swapping."""
        return free_bytes()

    def set_cap(self, num_bytes: int) -> None:
        """For the whole process, as far as torch goes in steps of its heaps."""
        share = num_bytes / self.recommended_bytes()
        # 0 would mean "no limit".
        torch.mps.set_per_process_memory_fraction(min(1.0, max(1e-6, share)))

    def cached_bytes(self) -> int:
        """What Metal has given to torch, and torch to nobody."""
        return torch.mps.driver_allocated_memory() - torch.mps.current_allocated_memory()

    def empty_cache(self) -> None:
        """Give it back to macOS."""
        torch.mps.empty_cache()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """From torch's own heaps of Metal's memory."""
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def empty_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Plain host memory.

        Never pinned: that was device memory in disguise up to torch 2.12 (pytorch#181374), and is
        no faster where it is not (pytorch#181720).
        """
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")

    def copy(self, dst_B: Tensor, src_B: Tensor, *, non_blocking: bool) -> None:
        """A blit in torch's stream."""
        dst_B.copy_(src_B, non_blocking=non_blocking)

    def record(self) -> Event:
        """An event of its own for each call. Recording commits what was issued (MPSHooks.mm)."""
        event = torch.mps.Event()
        event.record()
        return event

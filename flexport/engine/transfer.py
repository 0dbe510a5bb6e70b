"""Small tensors between host and device: token ids, masks, sampled logits."""

from __future__ import annotations

from torch import Tensor

from flexport.backend import Backend

__all__ = ["to_device", "to_host"]


def to_device(backend: Backend, host: Tensor) -> Tensor:
    """The host tensor on the device; the tensor itself where the host addresses the device's."""
    if backend.capabilities.addressable:
        return host
    staged = backend.allocate(host.shape, host.dtype, "host")
    staged.copy_(host)
    device = backend.allocate(host.shape, host.dtype, "device")
    backend.copy_async(staged, device).wait()
    return device


def to_host(backend: Backend, device: Tensor) -> Tensor:
    """The device tensor in host memory, complete; itself where the host addresses the device's."""
    if backend.capabilities.addressable:
        return device
    host = backend.allocate(device.shape, device.dtype, "host")
    backend.copy_async(device.contiguous(), host).join()
    return host

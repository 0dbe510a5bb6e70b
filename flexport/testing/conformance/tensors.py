"""Tensors of a backend, and threads, for the laws of the suite."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from flexport.backend import Backend
from flexport.torch_ops import torch_dtype

__all__ = [
    "COPIED_DTYPES",
    "PATHS",
    "PLACES",
    "SOME_TEXT",
    "Place",
    "dtypes_of",
    "in_threads",
    "on_host",
    "placed",
    "placed_keys",
    "some",
]

Place = Literal["device", "host"]

PLACES: tuple[Place, ...] = ("device", "host")

PATHS = [(src, dst) for src in PLACES for dst in PLACES]

COPIED_DTYPES = ("float32", "bfloat16", "float16", "uint8", "int8", "int32", "int64", "bool")

SOME_TEXT = r"\S"
"""Backends choose their own exception types; all the contract asks is that they say something."""

THREADS = 4


def dtypes_of(backend: Backend) -> list[torch.dtype]:
    """What the backend says it computes in, and float32, which all do."""
    names = dict.fromkeys([*backend.capabilities.dtypes, "float32"])
    return [torch_dtype(name) for name in names]


def some(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Seeded values in host memory; floats are normal, integers use their bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0, 127, tuple(shape), generator=generator).to(dtype)


def placed(backend: Backend, data: Tensor, where: Place = "device") -> Tensor:
    """A copy of a plain CPU tensor in the backend's memory."""
    host = backend.allocate(data.shape, data.dtype, "host")
    host.copy_(data)
    if where == "host":
        return host
    device = backend.allocate(data.shape, data.dtype)
    backend.copy_async(host, device).join()
    return device


def placed_keys(backend: Backend, keys_NKGE: Tensor, by_feature: bool) -> Tensor:
    """The same in device memory, feature by feature or column by column."""
    if by_feature:
        return placed(backend, keys_NKGE.mT).mT
    return placed(backend, keys_NKGE)


def on_host(backend: Backend, tensor: Tensor) -> Tensor:
    """A tensor's values where this process can look at them."""
    host = backend.allocate(tensor.shape, tensor.dtype, "host")
    backend.copy_async(tensor, host).join()
    return host


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run `work(0)`, `work(1)`, ... at the same time; raise the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

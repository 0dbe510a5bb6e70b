"""Small torch helpers shared by the core and by plug-ins: dtypes, raw bytes, memory errors."""

from __future__ import annotations

import errno
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DTYPES", "as_tensor", "is_out_of_memory", "torch_dtype"]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int32": torch.int32,
}
"""The dtypes a checkpoint may hold, by the names torch and transformers use."""

_NO_MEMORY = (
    "out of memory",
    "out of device memory",
    "out of host memory",
    "allocate memory",  # "can't allocate memory", "Cannot allocate memory"
    "not enough memory",
    "alloc failed",
)
"""What errors say that are no torch.OutOfMemoryError, in lower case and with spaces for "_": those of
device allocators that raise a plain RuntimeError (huggingface/accelerate issue 4226), of torch's own
host allocator (c10/core/impl/alloc_cpu.cpp) and of libraries that give a status by name."""


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; raises KeyError for one that is not in DTYPES."""
    return DTYPES[name]


def as_tensor(
    bytes_B: Tensor, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A view of a flat uint8 tensor's memory as a contiguous tensor; nothing is copied.

    The offset must be a multiple of the item size (safetensors promises that).
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    return bytes_B[offset_bytes : offset_bytes + num_bytes].view(dtype).view(tuple(shape))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, of a library below it or of the system says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error).lower().replace("_", " ")
    return isinstance(error, RuntimeError) and any(words in told for words in _NO_MEMORY)

"""Small torch helpers shared by the core and by plug-ins: dtypes by name, views of raw bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["DTYPES", "as_tensor", "dtype_name", "torch_dtype"]

DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""The floating-point dtypes a checkpoint may hold, by the names torch and transformers use."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype called `name`; raises KeyError for one that is not in DTYPES."""
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in DTYPES."""
    return _NAMES[dtype]


def as_tensor(
    bytes_B: Tensor, offset_bytes: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """A view of a flat uint8 tensor's memory as a contiguous tensor; nothing is copied.

    The offset must be a multiple of the item size (safetensors promises that).
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    return bytes_B[offset_bytes : offset_bytes + num_bytes].view(dtype).view(tuple(shape))

"""Reused work memory: first touch of fresh memory costs more than most kernels that use it.

Each thread has its own buffers, one per purpose and dtype, that only grow. The kernels bound
what they ask for by working in tiles.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["scratch"]

_thread = threading.local()


def scratch(purpose: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """This thread's contiguous buffer for `purpose`; its contents are whatever was there.

    Valid until the thread asks for the same purpose and dtype again.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _thread.__dict__.setdefault("buffers", {})
    num_items = math.prod(shape)
    flat = buffers.get((purpose, dtype))
    if flat is None or flat.numel() < num_items:
        # A tensor born in inference mode could not be written to outside it.
        with torch.inference_mode(False):
            flat = buffers[purpose, dtype] = torch.empty(num_items, dtype=dtype)
    return flat[:num_items].view(tuple(shape))

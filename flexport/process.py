"""The process that flexport runs in: settings that libraries under torch read once, and its heap.

What torch's kernels take beyond the tensors they are given counts against no budget, so it is
kept small here.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

__all__ = ["prepare", "trim_heap"]

SETTINGS = {
    # How long GNU OpenMP's threads spin at a barrier before they sleep. With their default a busy
    # neighbour on one core makes small kernels 10 to 40 times slower; this costs 10 % on an idle
    # one.
    "GOMP_SPINCOUNT": "1000",
    # Kernels that oneDNN, and torch's layer over it, keep: one for each number of tokens and
    # shape of a weight, of some hundred kB each. The default of both is 1024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def prepare() -> None:
    """Settings for libraries that come with torch, unless the user has made them. Call it first."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def trim_heap() -> None:
    """Give memory that nobody uses back to the system, where the C library can (glibc).

    Every visit allocates tensors of other sizes, which leaves holes between what stays; with 400
    tokens a visit they grew to 100 MB in a minute.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> ctypes._NamedFuncPointer | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None

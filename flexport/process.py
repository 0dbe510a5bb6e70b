"""The process that flexport runs in: settings that libraries under torch read once, and its heap.

What torch's kernels take beyond the tensors they are given counts against no budget, so it is
kept small here.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

__all__ = ["keep_heap", "prepare", "trim_heap"]

HEAP_TOP_BYTES = 1 << 30
MMAP_BYTES = 32 << 20
"""The most that glibc takes."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

SETTINGS = {
    # How long GNU OpenMP's threads spin at a barrier before they sleep. With their default a busy
    # neighbour on one core makes small kernels 10 to 40 times slower. With 1000 a decode step takes
    # 10 % longer on idle cores than with more, for threads are asleep when the next kernel comes;
    # this is as quick as more there, and 1.25 times as slow as 1000 beside a busy neighbour.
    "GOMP_SPINCOUNT": "3000",
    # Kernels that oneDNN, and torch's layer over it, keep: one for each number of tokens and
    # shape of a weight, of some hundred kB each. The default of both is 1024.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    "LRU_CACHE_CAPACITY": "64",
}


def prepare() -> None:
    """Settings for libraries that come with torch, unless the user has made them. Call it first."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def keep_heap() -> None:
    """Keep freed memory for the next tensor, where the C library can (glibc); see `trim_heap`.

    By default it gives back what is free at the heap's end, and the next product's result faults
    it in again, page by page: of decode steps of 64 rows that was a fifth of the time.
    """
    library = _c_library()
    if library is not None and hasattr(library, "mallopt"):
        library.mallopt(_M_TRIM_THRESHOLD, HEAP_TOP_BYTES)
        library.mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)


def trim_heap() -> None:
    """Give memory that nobody uses back to the system, where the C library can (glibc).

    Every visit allocates tensors of other sizes, which leaves holes between what stays; with 400
    tokens a visit they grew to 100 MB in a minute.
    """
    library = _c_library()
    if library is not None and hasattr(library, "malloc_trim"):
        library.malloc_trim(0)


@cache
def _c_library() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        return ctypes.CDLL(None)
    except OSError:
        return None

"""What can be said of a Mac without torch: whether it will do, in which dtypes, and how much of it.

Versions are tuples of numbers, e.g. (14, 5) for macOS 14.5.
"""

from __future__ import annotations

import os
import platform
import re
from importlib import metadata

import psutil

from flexport.backend import Capabilities

__all__ = [
    "MARGIN_BYTES",
    "MEMORY_VARIABLE",
    "choose_dtypes",
    "facts",
    "free_bytes",
    "macos_version",
    "reason_not_usable",
    "usable_bytes",
]

MEMORY_VARIABLE = "FLEXPORT_MPS_MEMORY"
"""Bytes, or e.g. 8GiB: a run uses no more by itself, and device tensors can't take more."""

PAGE_TOKENS = 256
"""Wide pages: each is two kernel launches in every layer."""

OLDEST_TORCH = (2, 6)
"""flexport's own; `torch.mps` has had all that is used here since 2.5."""

MARGIN_SHARE = 0.1
"""Left free for what no budget counts: other programs, and what macOS makes of file reads."""

MARGIN_BYTES = (1 << 30) + (128 << 20)
"""And at least this. Torch asks Metal for heaps of 1 GiB to cut buffers of 10 to 512 MiB from
(kXLargeHeap in ATen/mps/MPSAllocator.h), and all of a heap counts against its cap; so the last one
may be as good as empty while the cap is reached. The rest is for kernels and small heaps."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?b?))?b?", re.IGNORECASE)
"""A number, a letter for its thousands, and what says of which kind: 1024 unless it is "B" alone,
as in flexport's own options."""


def reason_not_usable() -> str | None:
    """Why this machine's GPU can't be used by way of Metal, in words for people; None if it can."""
    system, processor = platform.system(), platform.machine()
    if system != "Darwin":
        return f"needs macOS on Apple silicon; this is {system or 'an unknown system'}"
    if processor != "arm64":
        return (
            f"needs Apple silicon and a Python for it; this Python is for {processor}, so the Mac "
            "has an Intel processor or the Python runs under Rosetta"
        )
    try:
        torch_text = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "torch is not installed; install flexport with pip, which brings it"
    torch, macos = _numbers(torch_text), macos_version()
    if torch < OLDEST_TORCH:
        return f"torch {torch_text} is too old: install torch {_text(OLDEST_TORCH)} or newer"
    needed = _oldest_macos(torch)
    if macos < needed:
        return f"torch {torch_text} needs macOS {_text(needed)} or newer; this is {_text(macos)}"
    return None


def facts(recommended_bytes: int | None = None, available_bytes: int | None = None) -> Capabilities:
    """This GPU, as far as it is known.

    What Metal recommends as the most (None: no less than it can be) and what is free are found
    out if they are not given. Raises ValueError for a FLEXPORT_MPS_MEMORY that is no size.
    """
    if recommended_bytes is None:
        recommended_bytes = int(psutil.virtual_memory().total)
    available_bytes = free_bytes() if available_bytes is None else available_bytes
    asked = os.environ.get(MEMORY_VARIABLE, "").strip()
    dtypes, reason = choose_dtypes(macos_version())
    return Capabilities(
        name="mps",
        memory_bytes=usable_bytes(recommended_bytes, available_bytes, asked),
        unified=True,
        dtypes=dtypes,
        dtype_reason=reason,
        page_tokens=PAGE_TOKENS,
    )


def free_bytes() -> int:
    """What macOS could give without swapping."""
    return int(psutil.virtual_memory().available)


def macos_version() -> tuple[int, ...]:
    """The version of macOS; (0,) elsewhere."""
    return _numbers(platform.mac_ver()[0])


def choose_dtypes(macos: tuple[int, ...]) -> tuple[tuple[str, ...], str]:
    """dtypes worth computing in, best first, and why.

    Metal has bfloat16 from macOS 14 on (pytorch#119641), and M1 and M2 only emulate it
    (transformers#40458). float64 it has not.
    """
    if macos < (14,):
        return ("float16", "float32"), (
            "every Apple GPU multiplies float16 by itself, and macOS has bfloat16 for it only from 14 on"
        )
    return ("float16", "bfloat16", "float32"), (
        "every Apple GPU multiplies float16 by itself, and those of M1 and M2 only emulate bfloat16"
    )


def usable_bytes(recommended_bytes: int, free_bytes: int, asked: str) -> int:
    """Memory that a run may use when the user sets no cap.

    `recommended_bytes` is what Metal recommends as the most, `free_bytes` what is free now, and
    `asked` the text of FLEXPORT_MPS_MEMORY, which can only lower it. Raises ValueError for one
    that is no size.
    """
    most_bytes = min(recommended_bytes, free_bytes)
    margin_bytes = max(MARGIN_BYTES, int(most_bytes * MARGIN_SHARE))
    usable = max(0, most_bytes - margin_bytes)
    return min(usable, _parse_bytes(asked)) if asked else usable


def _oldest_macos(torch: tuple[int, ...]) -> tuple[int, ...]:
    """The oldest macOS on which that torch finds the GPU (pytorch#139425, pytorch#164943)."""
    return (14, 0) if torch >= (2, 10) else (13, 0)


def _parse_bytes(text: str) -> int:
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"FLEXPORT_MPS_MEMORY is {text!r}; write a size like 8GiB or 8000000000")
    number, letter, kind = found.groups()
    thousand = 1000 if kind and kind.lower() == "b" else 1024
    return int(float(number) * thousand ** " kmgt".index((letter or " ").lower()))


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.13.0+cpu" is (2, 13, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(number) for number in found[0].split(".")) if found else (0,)


def _text(version: tuple[int, ...]) -> str:
    return ".".join(str(number) for number in version)

"""What is said of a card: dtypes worth computing in, and memory a run may use. Needs no torch."""

from __future__ import annotations

import os
import re

from flexport.backend import Capabilities

__all__ = ["amd_dtypes", "bytes_from_environment", "facts", "memory_cap_bytes", "nvidia_dtypes"]

PAGE_TOKENS = 256
"""Attention takes a few kernel launches a page, so pages are as large as the core makes them."""

MARGIN_SHARE = 0.04
"""Left free for what no budget counts: the allocator's rounding, and what other programs take."""

MARGIN_BYTES = 384 << 20
"""And at least this: attention's work memory (three tiles of 32 MiB), cuBLAS's workspaces, and
kernels that are loaded when first used."""

MEMORY_VARIABLE = "FLEXPORT_CUDA_MEMORY"
"""The most device memory that this process may take, so that a large card stands in for a small
one."""

_BFLOAT16_CAPABILITY = (8, 0)
_BFLOAT16_ARCHITECTURES = ("gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
_FACTORS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)


def facts(
    name: str, dtypes: tuple[str, ...], dtype_reason: str, *, free_bytes: int
) -> Capabilities:
    """The record of a card on which `free_bytes` are free."""
    cap_bytes = memory_cap_bytes()
    most_bytes = free_bytes if cap_bytes is None else min(free_bytes, cap_bytes)
    margin_bytes = max(MARGIN_BYTES, int(most_bytes * MARGIN_SHARE))
    return Capabilities(
        name=name,
        memory_bytes=max(0, most_bytes - margin_bytes),
        unified=False,
        dtypes=dtypes,
        dtype_reason=dtype_reason,
        page_tokens=PAGE_TOKENS,
    )


def nvidia_dtypes(name: str, capability: tuple[int, int]) -> tuple[tuple[str, ...], str]:
    """dtypes worth computing in, best first, and why the first one is first."""
    card = f"{name} ({capability[0]}.{capability[1]})"
    if capability >= _BFLOAT16_CAPABILITY:
        return ("bfloat16", "float16", "float32"), f"{card} has bfloat16 matrix units"
    return ("float16", "float32"), f"{card} has no bfloat16 matrix units"


def amd_dtypes(name: str, architecture: str) -> tuple[tuple[str, ...], str]:
    """The same for an AMD card of an architecture such as "gfx90a:sramecc+:xnack-"."""
    short = architecture.partition(":")[0]
    if short.startswith(_BFLOAT16_ARCHITECTURES):
        return ("bfloat16", "float16", "float32"), f"{name} ({short}) has bfloat16 matrix units"
    return ("float16", "float32"), f"{name} ({short}) has no bfloat16 matrix units"


def memory_cap_bytes() -> int | None:
    """What FLEXPORT_CUDA_MEMORY says; None if it says nothing."""
    return bytes_from_environment(MEMORY_VARIABLE)


def bytes_from_environment(variable: str) -> int | None:
    """A size such as "16GiB" or "17179869184", in binary units; None if it is not set.

    Raises ValueError for anything else.
    """
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{variable} has to be a size such as 16GiB, got {text!r}")
    return int(float(match[1]) * _FACTORS[match[2].lower()])

"""Sizes and times as people write them: "14GiB", "1.5 GB", "2 min 05 s".

Inside flexport a size is an int in bytes and a time a float in seconds; text like this exists
only at the border with people.
"""

from __future__ import annotations

import re

__all__ = [
    "VALUE_BYTES",
    "format_bytes",
    "format_count",
    "format_rate",
    "format_seconds",
    "format_tok_s",
    "parse_bytes",
]

VALUE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one value of each floating-point dtype."""

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_FACTORS = {
    "": 1, "b": 1,
    "k": KIB, "kib": KIB, "kb": 10**3,
    "m": MIB, "mib": MIB, "mb": 10**6,
    "g": GIB, "gib": GIB, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "14GiB", "1.5 GB", "800m" (binary) or "4096".

    Raises ValueError for anything else.
    """
    match = _SIZE.fullmatch(text)
    factor = _FACTORS.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a size; write e.g. 14GiB, 1.5GB or 800MiB")
    return int(float(match[1]) * factor)


def format_bytes(num_bytes: float) -> str:
    """A size for people, in binary units: "1.50 GiB"."""
    for factor, unit in ((1 << 40, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(number: int) -> str:
    """A number of parameters for people: "7.25 B", "355 M"."""
    return f"{number / 1e9:.2f} B" if number >= 999.5e6 else f"{number / 1e6:.0f} M"


def format_rate(bytes_per_s: float) -> str:
    """A bandwidth for people, in decimal units as links are sold: "1.5 GB/s"."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def format_seconds(seconds: float) -> str:
    """A duration for people: "0.8 s", "2 min 05 s", "3 h 12 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02d} s"
    return f"{round(seconds) // 3600} h {round(seconds) % 3600 // 60:02d} min"


def format_tok_s(tokens_per_s: float) -> str:
    """A rate of tokens for people, in three digits at least: "1141 tok/s", "55.5 tok/s", "0.774 tok/s"."""
    digits = 0 if tokens_per_s >= 999.5 else 1 if tokens_per_s >= 9.995 else 3
    return f"{tokens_per_s:.{digits}f} tok/s"

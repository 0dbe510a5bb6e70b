"""What the processor is called, which instructions it has, and so which dtypes are fast.

A dtype is worth computing in where its matrix products run on instructions made for it.
Elsewhere they are emulated: float16 on x86 without AVX512-FP16 or AMX-FP16 runs about ten times
slower than bfloat16 does.
"""

from __future__ import annotations

import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import cpuinfo

__all__ = ["choose_dtypes", "processor_flags", "processor_name"]

_BFLOAT16_FLAGS = {
    "amx_bf16": "AMX-BF16",
    "avx512_bf16": "AVX512-BF16",
    "avx10_2": "AVX10.2",
    "bf16": "ARM BF16",
}
_FLOAT16_FLAGS = {
    "amx_fp16": "AMX-FP16",
    "avx512_fp16": "AVX512-FP16",
    "asimdhp": "NEON half precision",
}
_FLOAT32_FLAGS = {"avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}


@cache
def processor_flags() -> frozenset[str]:
    """Instruction-set flags, as Linux spells them."""
    listed = _proc_cpuinfo("flags") or _proc_cpuinfo("Features")
    if listed:
        return frozenset(listed.lower().split())
    return frozenset(flag.lower() for flag in _py_cpuinfo().get("flags", ()))


@cache
def processor_name() -> str:
    """The processor's brand, for people."""
    name = _proc_cpuinfo("model name") or str(_py_cpuinfo().get("brand_raw", ""))
    return name or platform.processor() or platform.machine() or "unknown processor"


def choose_dtypes(
    flags: frozenset[str], torch_bfloat16: bool = True, torch_float16: bool = True
) -> tuple[tuple[str, ...], str]:
    """dtypes worth computing in, best first, and why the first one is first.

    A dtype counts only where both the processor has instructions for it and this build of torch
    uses them, as the last two arguments say.
    """
    bfloat16 = _first(_BFLOAT16_FLAGS, flags)
    float16 = _first(_FLOAT16_FLAGS, flags)
    half = ("float16",) if float16 and torch_float16 else ()
    if bfloat16 and torch_bfloat16:
        reason = f"the processor multiplies bfloat16 matrices natively ({bfloat16})"
        return ("bfloat16", "float32", *half), reason
    simd = _first(_FLOAT32_FLAGS, flags) or "no vector instructions that flexport knows"
    if bfloat16:
        reason = f"the processor has {bfloat16} but this build of torch does not use it"
    else:
        reason = f"the processor has no bfloat16 matrix instructions ({simd}); float32 is fastest"
    return ("float32", *half), reason


def _first(names: dict[str, str], flags: frozenset[str]) -> str | None:
    """The name of the first flag in `names` that the processor has."""
    return next((name for flag, name in names.items() if flag in flags), None)


@cache
def _proc_cpuinfo(field: str) -> str:
    """A field of Linux's /proc/cpuinfo, "" where there is none: instant, unlike py-cpuinfo."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    match = re.search(rf"^{re.escape(field)}\s*:\s*(.*)$", text, re.MULTILINE)
    return match[1].strip() if match else ""


@cache
def _py_cpuinfo() -> dict[str, Any]:
    """py-cpuinfo's record. Takes about a second, so it is asked only off Linux, and once."""
    return dict(cpuinfo.get_cpu_info())

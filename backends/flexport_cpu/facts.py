"""What the CPU says of itself, as far as that needs no torch."""

from __future__ import annotations

from flexport.backend import Capabilities
from flexport_cpu.free_memory import usable_bytes
from flexport_cpu.processor import choose_dtypes, processor_flags, processor_name

__all__ = ["facts"]

PAGE_TOKENS = 64


def facts() -> Capabilities:
    """This processor with a torch that uses all of its instructions."""
    dtypes, reason = choose_dtypes(processor_flags())
    return Capabilities(
        name=f"cpu ({processor_name()})",
        memory_bytes=usable_bytes(),
        unified=True,
        addressable=True,
        dtypes=dtypes,
        dtype_reason=reason,
        page_tokens=PAGE_TOKENS,
    )

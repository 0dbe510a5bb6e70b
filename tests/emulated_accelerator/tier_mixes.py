"""Mixes of tiers and shapes of blocks that every device has to give the same tokens for."""

from __future__ import annotations

from typing import Any

import pytest

__all__ = [
    "AMPLE",
    "BLOCKS",
    "LENGTHS",
    "MIXES",
    "any_mix",
    "block_of",
    "expected_of",
    "is_unified",
    "options",
    "prompts_of",
    "reference_of",
]

AMPLE: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "1GiB"}

_ROWS = [0, 3, 9, 1, 6, 4, 8, 2]
LENGTHS = [14, 3, 9, 14, 1, 7, 14, 2]
"""Rows end at different steps, so that caches shrink and batches end early."""

BLOCKS: list[dict[str, int]] = [
    {"batch_size": 3, "num_batches": 2},
    {"batch_size": 5, "num_batches": 1, "sweep_tokens": 20},
    {"batch_size": 2, "num_batches": 4, "prefill_tokens": 8},
    {"batch_size": 4, "num_batches": 2, "prefill_tokens": 16, "sweep_tokens": 30},
]

MIXES = [
    [100, 0, 100, 0, 100, 0],
    [0, 100, 0, 100, 0, 100],
    [0, 0, 0, 0, 0, 0],
    [30, 30, 40, 30, 20, 40],
    [50, 50, 100, 0, 0, 100],
    [0, 100, 100, 0, 100, 0],
    [100, 0, 0, 100, 0, 0],
    [100, 0, 0, 0, 50, 50],
    [20, 0, 50, 0, 100, 0],
    [0, 60, 0, 40, 100, 0],
    [70, 30, 30, 70, 60, 0],
    [0, 0, 100, 0, 0, 100],
]

_VARIANTS = ["125m-like", "350m-like", "galactica-like", "untied-like"]

any_mix = pytest.mark.parametrize(
    ("number", "percent"), list(enumerate(MIXES)), ids=["-".join(map(str, mix)) for mix in MIXES]
)
"""For a test of `number` and `percent`."""


def reference_of(number: int, reference: Any) -> Any:
    """The checkpoint that goes with a mix."""
    return reference(_VARIANTS[number % 4], "float16" if number % 3 == 2 else "float32")


def block_of(number: int) -> dict[str, int]:
    """The shape of block that goes with a mix."""
    return BLOCKS[(number + number // 4) % 4]


def is_unified(number: int) -> bool:
    """Whether memory is one with a mix: for half of each checkpoint's and each block's."""
    return (number % 4 // 2 + number // 4) % 2 == 1


def options(
    found: Any, backend: Any, percent: list[int], block: dict[str, int], offload_dir: Any
) -> dict[str, Any]:
    """Of a `flexport.LLM`."""
    return {
        "model": found.directory,
        "backend": backend,
        "dtype": "float32",
        "percent": percent,
        "offload_dir": offload_dir,
        **block,
    }


def prompts_of(found: Any) -> list[list[int]]:
    """The prompts of a job."""
    return [found.prompts[row] for row in _ROWS]


def expected_of(found: Any) -> list[list[int]]:
    """What they are continued by."""
    return [found.continued(row, length) for row, length in zip(_ROWS, LENGTHS, strict=True)]

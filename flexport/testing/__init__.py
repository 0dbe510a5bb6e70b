"""Shipped for tests, ours and strangers': the suites of backends and of families, and fakes.

`BackendConformance` is the meaning of `flexport.backend`: subclass it and give it a `backend`
fixture. `FamilyConformance` holds a family of models to what transformers computes: subclass it and
list its `variants`. `DiscreteBackend` is a device with memory of its own, made of host memory. They
are imported when asked for, since the suites need pytest and hypothesis (`flexport[test]`).
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexport.testing.conformance import (
        AttentionCase,
        BackendConformance,
        attention_in_float64,
    )
    from flexport.testing.discrete import DiscreteBackend
    from flexport.testing.families import FamilyConformance, Variant

__all__ = [
    "AttentionCase",
    "BackendConformance",
    "DiscreteBackend",
    "FamilyConformance",
    "Variant",
    "attention_in_float64",
]

_BACKENDS, _FAMILIES = f"{__name__}.conformance", f"{__name__}.families"

_HOMES = {
    "AttentionCase": _BACKENDS,
    "BackendConformance": _BACKENDS,
    "DiscreteBackend": f"{__name__}.discrete",
    "FamilyConformance": _FAMILIES,
    "Variant": _FAMILIES,
    "attention_in_float64": _BACKENDS,
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES[name]
    if home in (_BACKENDS, _FAMILIES) and home not in sys.modules:
        import pytest

        # So that a failing law shows the values, as an assert in a test file does.
        pytest.register_assert_rewrite(home)
    return getattr(import_module(home), name)

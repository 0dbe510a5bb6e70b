"""Shipped for tests, ours and strangers': the conformance suite of backends, and fakes.

`BackendConformance` is the meaning of `flexport.backend`: subclass it and give it a `backend`
fixture. `DiscreteBackend` is a device with memory of its own, made of host memory. They are
imported when asked for, since the suite needs pytest and hypothesis (`flexport[test]`).
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

__all__ = ["AttentionCase", "BackendConformance", "DiscreteBackend", "attention_in_float64"]

_SUITE = f"{__name__}.conformance"

_HOMES = {
    "AttentionCase": _SUITE,
    "BackendConformance": _SUITE,
    "DiscreteBackend": f"{__name__}.discrete",
    "attention_in_float64": _SUITE,
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] == _SUITE and _SUITE not in sys.modules:
        import pytest

        # So that a failing law shows the values, as an assert in a test file does.
        pytest.register_assert_rewrite(_SUITE)
    return getattr(import_module(_HOMES[name]), name)

"""Shipped for tests, ours and strangers': the conformance suite of backends, and fakes.

`BackendConformance` is the meaning of `flexport.backend`: subclass it and give it a `backend`
fixture. `DiscreteBackend` is a device with memory of its own, made of host memory. Both are
imported when asked for, since the suite needs pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexport.testing.conformance import BackendConformance
    from flexport.testing.discrete import DiscreteBackend

__all__ = ["BackendConformance", "DiscreteBackend"]


def __getattr__(name: str) -> object:
    if name == "BackendConformance":
        from flexport.testing.conformance import BackendConformance

        return BackendConformance
    if name == "DiscreteBackend":
        from flexport.testing.discrete import DiscreteBackend

        return DiscreteBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

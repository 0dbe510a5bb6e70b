"""The meaning of `flexport.backend`: laws that every backend must keep.

Subclass `BackendConformance`, give it a fixture `backend` that opens a fresh backend for each
test, and run pytest. A module here is one verb, or one thing that all verbs promise together.
Numbers are compared with float64 references (`reference`), within bounds whose reasons stand beside
them (`problems`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flexport.backend import Backend
from flexport.testing.conformance.allocate import AllocateLaws
from flexport.testing.conformance.attention import AttentionLaws
from flexport.testing.conformance.copies import CopyLaws
from flexport.testing.conformance.errors import ErrorLaws
from flexport.testing.conformance.facts import FactLaws
from flexport.testing.conformance.lifetimes import LifetimeLaws
from flexport.testing.conformance.matmul import MatmulLaws
from flexport.testing.conformance.memory import MemoryLaws
from flexport.testing.conformance.order import OrderLaws
from flexport.testing.conformance.packed import PackedLaws
from flexport.testing.conformance.problems import AttentionCase
from flexport.testing.conformance.reference import attention_in_float64
from flexport.testing.conformance.whole import WholeLaws

__all__ = ["AttentionCase", "BackendConformance", "attention_in_float64"]


class BackendConformance(
    FactLaws,
    AllocateLaws,
    CopyLaws,
    LifetimeLaws,
    OrderLaws,
    ErrorLaws,
    MemoryLaws,
    MatmulLaws,
    PackedLaws,
    AttentionLaws,
    WholeLaws,
):
    """Subclass this and give it a `backend` fixture with a fresh backend for each test."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """Open the backend under test, yield it, close it."""
        raise NotImplementedError("a conformance test class needs a `backend` fixture")

    @pytest.fixture
    def small_backend(self) -> Iterator[Backend]:
        """Optional: the same with little device memory, which the laws of `memory` fill up.

        Its `capabilities.memory_bytes` is between 1 MiB and some hundred MiB, and hard: so much
        can be allocated, and no more. Skipped where nobody gives one, since to fill the memory
        of the machine that runs the tests would be rude.
        """
        pytest.skip("this test class gives no `small_backend`")

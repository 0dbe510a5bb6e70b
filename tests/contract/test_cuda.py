"""The CUDA plug-in keeps the contract, on a card of threads everywhere and on a real one if any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_card import FakeCard
from flexport_cuda.backend import CudaBackend

from flexport.backend import Backend
from flexport.testing.conformance import BackendConformance


class TestCudaOnAFakeCard(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = CudaBackend(FakeCard())
        yield backend
        backend.close()

"""The CUDA plug-in keeps the contract, on a card of threads everywhere and on a real one if any."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fake_card import FakeCard
from flexport_cuda import PLUGIN
from flexport_cuda.backend import CudaBackend

from flexport.backend import Backend
from flexport.testing.conformance import BackendConformance
from flexport.torch_ops import attention as plain


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """A fake card's number may be the next one's, whose tensors these would not be."""
    yield
    plain._kept_mask.cache_clear()
    plain._on_device.cache_clear()


class TestCudaOnAFakeCard(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = CudaBackend(FakeCard())
        yield backend
        backend.close()

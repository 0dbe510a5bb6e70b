"""The toaster keeps the contract."""

from collections.abc import Iterator

import pytest
from flexport_toaster import PLUGIN
from flexport_toaster.backend import ToasterBackend

from flexport.backend import Backend
from flexport.testing import BackendConformance


class TestToaster(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PLUGIN.open()
        yield backend
        backend.close()

    @pytest.fixture
    def small_backend(self) -> Iterator[Backend]:
        backend = ToasterBackend(memory_bytes=1 << 20)
        yield backend
        backend.close()

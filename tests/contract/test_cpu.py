"""The CPU plug-in keeps the contract."""

from collections.abc import Iterator

import pytest
from flexport_cpu import PLUGIN

from flexport.backend import Backend
from flexport.testing.conformance import BackendConformance


class TestCpu(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PLUGIN.open()
        yield backend
        backend.close()

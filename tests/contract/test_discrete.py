"""The fake device keeps the contract, with threads and with copies as late as they may be."""

from collections.abc import Iterator

import pytest

from flexport.backend import Backend
from flexport.testing.conformance import BackendConformance
from flexport.testing.discrete import DiscreteBackend


class TestDiscrete(BackendConformance):
    @pytest.fixture(params=[False, True], ids=["threads", "late"])
    def backend(self, request: pytest.FixtureRequest) -> Iterator[Backend]:
        backend = DiscreteBackend(late=request.param)
        yield backend
        backend.close()

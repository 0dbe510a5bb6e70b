"""The conformance suite catches what it is there to catch: backends with one fault each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from broken_backends import CATCHES
from broken_backends.packed import MultipliesPackedBread
from flexport_emulated.backend import EmulatedBackend
from torch.utils import backend_registration

from flexport.backend import Backend
from flexport.testing import BackendConformance
from flexport.testing.conformance.packed import PackedLaws


class TestPackedBread(PackedLaws):
    """No backend of flexport's own multiplies in float32, so the laws are seen to hold here."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = MultipliesPackedBread()
        yield backend
        backend.close()


SUITE = """
import pytest
from flexport.testing import BackendConformance

class TestBroken(BackendConformance):
    @pytest.fixture
    def backend(self, broken):
        backend = broken()
        yield backend
        backend.close()

    @pytest.fixture
    def small_backend(self, broken):
        backend = broken(memory_bytes=1 << 20)
        yield backend
        backend.close()
"""


class Run:
    """A pytest plug-in that gives the class under test, and listens."""

    def __init__(self, broken: type) -> None:
        self._broken = broken
        self.failed: list[str] = []
        """The phases that failed: "setup", "call" or "teardown"."""

    @pytest.fixture
    def broken(self) -> type:
        """The backend's class."""
        return self._broken

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Called by pytest."""
        if report.failed:
            self.failed.append(report.when or "")


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test file as a stranger writes it."""
    path = tmp_path_factory.mktemp("stranger") / "test_stranger.py"
    path.write_text(SUITE)
    return path


@pytest.mark.parametrize(
    ("broken", "law"), CATCHES, ids=[f"{broken.__name__}-{law[5:]}" for broken, law in CATCHES]
)
def test_a_broken_backend_is_caught(broken: type, law: str, suite: Path) -> None:
    if issubclass(broken, EmulatedBackend) and not hasattr(
        backend_registration, "_setup_privateuseone_for_python_backend"
    ):
        pytest.skip("this torch has no devices written in Python")
    run = Run(broken)

    # In this process, since torch takes seconds to import. Not by pytester, which would forget
    # what torch has imported meanwhile.
    pytest.main(
        [
            f"{suite}::TestBroken::{law}",
            "-x",
            *("--rootdir", str(suite.parent), "-c", os.devnull, "--import-mode=importlib"),
            *("--confcutdir", str(suite.parent)),  # or else it looks at all that lies above
            *("--capture=no", "-p", "no:cacheprovider", "-p", "no:faulthandler"),
        ],
        plugins=[run],
    )

    assert run.failed[:1] == ["call"]


def test_every_law_has_been_seen_to_fail() -> None:
    laws = {name for name in dir(BackendConformance) if name.startswith("test_")}

    assert {law for _, law in CATCHES} <= laws
    assert sorted(laws - {law for _, law in CATCHES}) == []

"""What `pip install` does for a stranger: the entry point is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _installed(install: Callable[[Path], None]) -> None:
    install(Path(__file__).parent)

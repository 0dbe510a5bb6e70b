"""What every test can count on: no network, the CPU, one meaning of a device marker, steady properties.

And what the tests of strangers' packages share.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# Read when huggingface_hub is first imported; no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Where there is a better device than the CPU, too, a test that wants it names it.
os.environ["FLEXPORT_BACKEND"] = "cpu"

import pytest
from hypothesis import HealthCheck, settings

DEVICES = ("cuda", "mps")
"""Markers of tests that need a device, each named as torch names the device."""

# No deadline: a busy machine is not a failure. Derandomised: a red run can be run again.
settings.register_profile(
    "flexport", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flexport")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--need",
        action="append",
        choices=DEVICES,
        default=[],
        help="fail, rather than skip, the tests that need this device and don't find it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for device in DEVICES:
        marked = [item for item in items if item.get_closest_marker(device)]
        if not marked or device in config.getoption("--need") or _has(device):
            continue
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs the device {device!r}"))


def pytest_collection_finish(session: pytest.Session) -> None:
    """The modules and tests there are by now stay to the end, and the collector may pass them by.

    They are half a million objects, through which each gc.collect() of a test would go again.
    """
    gc.collect()
    gc.freeze()


def _has(device: str) -> bool:
    import torch

    try:
        # A virtual Mac shows a GPU that has no memory.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Packed weights go to a cache of the session's own, and not to the user's."""
    os.environ["FLEXPORT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def install(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], None]:
    """install(folder): what pip would leave of a package's entry points, in a folder on the path.

    Written here and not installed, so that the tests run in a plain checkout and offline.
    """
    site = tmp_path_factory.mktemp("site")

    def install(folder: Path) -> None:
        # pytest itself brings tomli where Python has no tomllib yet.
        toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        project = toml.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project["version"]
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            f"Summary: {project['description']}\n"
        )
        lines = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delenv("FLEXPORT_BACKEND", raising=False)

    return install

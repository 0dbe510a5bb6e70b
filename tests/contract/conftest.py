"""What the tests of strangers' packages share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """install(folder): what pip would leave of a package's entry points, in a folder on the path.

    Written here and not installed, so that the tests run in a plain checkout and offline.
    """

    def install(folder: Path) -> None:
        # pytest itself brings tomli where Python has no tomllib yet.
        toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        project = toml.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        name, version = project["name"], project["version"]
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [
            line
            for group, entries in project["entry-points"].items()
            for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
        ]
        (info / "entry_points.txt").write_text("\n".join(lines))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delenv("FLEXPORT_BACKEND", raising=False)

    return install

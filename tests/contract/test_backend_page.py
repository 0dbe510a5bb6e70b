"""The page on backends prints the toaster whole, and what it prints works."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import flexport
from flexport import SamplingParams
from flexport.registry import auto_order, backends, open_backend
from flexport.testing.checkpoints import tiny_opt

ROOT = Path(__file__).parent.parent.parent

FOLDER = ROOT / "tests" / "toaster"

FILES = sorted(
    path.relative_to(FOLDER).as_posix()
    for pattern in ("*.toml", "flexport_toaster/*.py", "tests/*.py")
    for path in FOLDER.glob(pattern)
)


def printed() -> dict[str, str]:
    """The files that the page prints: a path in backquotes and a colon, then a block of code."""
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE))


def test_the_page_prints_every_file_as_it_is() -> None:
    assert printed() == {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}


def test_the_package_is_less_than_200_lines() -> None:
    assert sum(len(code.splitlines()) for code in printed().values()) < 200


def test_the_page_says_what_every_module_of_the_suite_is_about() -> None:
    page = (ROOT / "docs" / "backends.md").read_text(encoding="utf-8")
    suite = ROOT / "flexport" / "testing" / "conformance"

    modules = {path.stem for path in suite.glob("*.py") if "Laws" in path.read_text("utf-8")}

    rows = re.findall(r"^\| (`[a-z_`, ]+`) \| [^|]+ \|$", page, re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"\w+", row)}
    assert modules - {"__init__"} <= named


def test_it_imports_of_flexport_what_a_plug_in_may() -> None:
    imported: set[str] = set()
    for path in (FOLDER / "flexport_toaster").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")

    of_the_core = {name for name in imported if name.split(".")[0] == "flexport"}
    assert of_the_core == {
        "flexport.backend",
        "flexport.errors",
        "flexport.torch_ops.attention",
    }


def test_its_entry_point_is_all_it_takes(install: Callable[[Path], None]) -> None:
    install(FOLDER)

    name, backend = open_backend("toaster")
    backend.close()

    assert (name, type(backend).__name__) == ("toaster", "ToasterBackend")
    names = [listing.name for listing in auto_order(backends())]
    assert names.index("cpu") < names.index("toaster")


def test_what_it_misses_is_told(
    install: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(FOLDER)
    monkeypatch.setenv("TOASTER_PLUGGED_IN", "no")

    (listing,) = [listing for listing in backends() if listing.name == "toaster"]

    assert listing.reason_not_usable == "the toaster is not plugged in"


def test_a_model_says_on_it_what_it_says_on_the_cpu(
    install: Callable[[Path], None], tmp_path: Path
) -> None:
    install(FOLDER)
    directory = tiny_opt(tmp_path / "model")
    prompts = [[7, 90, 33], [101, 5], [60, 61, 62, 63, 64, 65]]
    greedy = SamplingParams(max_tokens=9, ignore_eos=True)

    said = {}
    for backend in ("cpu", "toaster"):
        with flexport.LLM(
            str(directory), backend=backend, dtype="float32", host_memory="64MiB"
        ) as llm:
            rows = llm.generate(prompts, greedy)
            said[backend] = sorted((row.request_id, row.outputs[0].token_ids) for row in rows)

    assert said["toaster"] == said["cpu"]

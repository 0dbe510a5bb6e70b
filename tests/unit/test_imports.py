"""Which module may know which: the arrows, and what must start without torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

import flexport

ROOT = Path(__file__).resolve().parents[2]


def modules_loaded_by(*arguments: str) -> set[str]:
    """Modules that are loaded once `flexport ARGUMENTS...` is through, in a fresh process."""
    program = (
        "import json, sys\n"
        "from flexport.cli.main import main\n"
        "main(sys.argv[1:])\n"
        "print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["backends"],
        ["backends", "--json"],
        ["models"],
        ["run", "--help"],
        ["bench", "--help"],
        ["profile", "--help"],
    ],
    ids=" ".join,
)
def test_a_command_that_computes_nothing_imports_no_torch(arguments):
    loaded = modules_loaded_by(*arguments)

    assert "flexport.cli.main" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "tokenizers"}


@pytest.mark.parametrize(
    "arguments",
    [[], ["--model", "facebook/opt-125m", "--load-format", "dummy", "--json"]],
    ids=["with a tokenizer", "without"],
)
def test_a_plan_imports_neither_torch_nor_transformers(arguments):
    loaded = modules_loaded_by("plan", "--backend", "cpu", *arguments)

    assert "flexport.cli.plan" in loaded
    assert ("tokenizers" in loaded) == (not arguments)
    assert not loaded & {"torch", "transformers"}


def test_help_imports_no_subcommand():
    loaded = modules_loaded_by("--help")

    assert {name for name in loaded if name.startswith("flexport.cli.")} == {"flexport.cli.main"}


def test_importing_flexport_imports_no_torch():
    program = "import sys, flexport; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("name", flexport.__all__)
def test_every_public_name_can_be_imported(name):
    assert getattr(flexport, name) is not None
    assert name in dir(flexport)


def test_a_name_that_is_not_public_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'Llm'"):
        _ = flexport.Llm


def test_the_version_is_the_distribution_s():
    from importlib.metadata import version

    assert flexport.__version__ == version("flexport")


def test_imports_go_one_way():
    """The contracts are in pyproject.toml, under [tool.importlinter]."""
    pytest.importorskip("importlinter", reason="import-linter is a tool of the dev extra")

    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("line", "offends"),
    [
        ('if device == "cuda":', True),
        ("is_cuda = False", True),
        ("# an MPS tensor", True),
        ("json.dumps(timestamps)", False),
    ],
)
def test_a_line_that_names_hardware_is_found_in_the_core(tmp_path, line, offends):
    offending_lines = run_path(str(ROOT / "ci/check_core_names.py"))["offending_lines"]
    core = tmp_path / "flexport"
    core.mkdir()
    (core / "module.py").write_text(f"x = 1\n{line}\n", encoding="utf-8")

    found = offending_lines(core)

    assert found == ([f"flexport/module.py:2: {line}"] if offends else [])


def test_the_core_names_no_hardware():
    done = subprocess.run(
        [sys.executable, "ci/check_core_names.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout

"""Everything the automation checks, in one command: `python3 ci/check.py`.

It makes the virtual environment .venv (or uses the one that is there), installs flexport with
its test tools into it, and runs each step below in turn, whether or not an earlier one failed.

    python3 ci/check.py                         all steps
    python3 ci/check.py lint type               some of them
    python3 ci/check.py test -- -k order        pytest gets what follows "--"
    python3 ci/check.py --here lint             with the running Python; installs nothing

Exit code: 0 if all steps passed, 1 if not, 2 for wrong usage.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"

STEPS: dict[str, tuple[tuple[str, ...], ...]] = {
    "lint": (
        ("-m", "ruff", "check", "."),
        ("-m", "ruff", "format", "--check", "."),
    ),
    "imports": (
        ("-c", "from importlinter.cli import lint_imports_command as run; run()"),
        ("ci/check_core_names.py",),
    ),
    "type": (("-m", "mypy"),),
    "test": (("-m", "pytest"),),
}
"""Arguments of Python, for each command of each step. The tests come last: theirs are the lines
that people, and machines that read logs, look for at the end."""


def main(argv: Sequence[str]) -> int:
    """Run the steps that argv asks for; returns the exit code."""
    own = list(argv)
    for_pytest: list[str] = []
    if "--" in own:
        border = own.index("--")
        own, for_pytest = own[:border], own[border + 1 :]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of: {', '.join(STEPS)}")
    parser.add_argument("--here", action="store_true", help="use the running Python as it is")
    args = parser.parse_args(own)
    unknown = sorted(set(args.steps) - set(STEPS))
    if unknown:
        parser.error(f"no step named {', '.join(unknown)}; there are: {', '.join(STEPS)}")
    chosen = [step for step in STEPS if not args.steps or step in args.steps]

    python = sys.executable if args.here else install()
    failed = [step for step in chosen if not run_step(python, step, for_pytest)]
    if failed:
        print(f"\nfailed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def install() -> str:
    """The Python of .venv, with flexport and its test tools installed there."""
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        say(f"making {VENV}")
        venv.create(VENV, with_pip=True, symlinks=os.name != "nt")
    say("installing flexport and its test tools")
    # Most of what torch and transformers bring is never imported; what is, is compiled then.
    how = ("--quiet", "--disable-pip-version-check", "--no-compile")
    subprocess.run(
        [python, "-m", "pip", "install", *how, "-c", "ci/constraints.txt", "-e", ".[dev]"],
        cwd=ROOT,
        check=True,
    )
    return str(python)


def run_step(python: str, step: str, for_pytest: Sequence[str]) -> bool:
    """Whether every command of a step passed."""
    passed = True
    for arguments in STEPS[step]:
        more = (*parallel(for_pytest), *for_pytest) if step == "test" else ()
        say(f"{step}: python {' '.join((*arguments, *more))}")
        command = [python, *arguments, *more]
        result = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
        passed &= result.returncode == 0
    return passed


def parallel(for_pytest: Sequence[str]) -> tuple[str, ...]:
    """Two processes, unless the caller says how many.

    Each takes a half of the tests in their order, and then what the other has left: tests that
    share a model mostly run where it was made.
    """
    said = any(argument.startswith(("-n", "--numprocesses")) for argument in for_pytest)
    return () if said else ("-n", "2", "--dist", "worksteal")


def environment() -> dict[str, str]:
    """This process's environment, with one thread for each of the parallel test processes."""
    return {"OMP_NUM_THREADS": "1", **os.environ}


def say(line: str) -> None:
    """Print a heading before what a subprocess prints."""
    print(f"\n== {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Whose numbers a plan is made with: this machine's, those of one like it, or one asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal

from flexport.backend import Capabilities
from flexport.errors import UsageError
from flexport.planner.machine import Machine, read_machine
from flexport.planner.typical import typical
from flexport.policy import Budgets

__all__ = ["Numbers", "machine_here", "machine_named"]

Numbers = Literal["measured", "typical", "asked"]
"""Those of this machine; those of one like it, which nobody has measured; those of another one."""

_SHIPPED = files("flexport.planner").joinpath("machines")


def machine_here(facts: Capabilities, backend: str, budgets: Budgets) -> tuple[Machine, Numbers]:
    """The machine that this one is, or else is taken for."""
    return typical(facts, backend, budgets), "typical"


def machine_named(text: str) -> Machine:
    """The machine of a file, or one that is shipped; raises UsageError for what is neither."""
    if text.endswith(".json") or Path(text).is_file():
        return read_machine(Path(text))
    names = _shipped_names()
    if text not in names:
        raise UsageError(
            f"--machine {text} is no file, and no machine of that name is shipped; there are: "
            f"{', '.join(names) or 'none'}"
        )
    return read_machine(Path(str(_SHIPPED.joinpath(f"{text}.json"))))


def _shipped_names() -> list[str]:
    if not _SHIPPED.is_dir():
        return []
    return sorted(
        Path(each.name).stem for each in _SHIPPED.iterdir() if each.name.endswith(".json")
    )

"""Whose numbers a plan is made with: this machine's, those of one like it, or one asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from flexport.backend import Capabilities
from flexport.engine.known_machine import known_machine
from flexport.planner.machine import Machine, read_machine
from flexport.planner.shipped import like, shipped

__all__ = ["Numbers", "machine_here", "machine_named"]

Numbers = Literal["measured", "typical", "asked"]
"""Those of this machine; those of one like it, which nobody has measured; those of another one."""


def machine_here(facts: Capabilities, backend: str, directory: Path) -> tuple[Machine, Numbers]:
    """The machine that this one is, with the disk of a folder, or else is taken for."""
    measured = known_machine(backend, directory, facts)
    return (measured, "measured") if measured else (like(backend, facts), "typical")


def machine_named(text: str) -> Machine:
    """The machine of a file, or one that is shipped; raises UsageError for what is neither."""
    if text.endswith(".json") or Path(text).is_file():
        return read_machine(Path(text))
    return shipped(text)

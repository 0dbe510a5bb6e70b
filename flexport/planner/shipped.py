"""Machines that come with flexport: to plan for one that is not at hand, or was not measured.

Their files are in `machines/`, and say of each number where it comes from. docs/machines.md says how
they were made.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import lru_cache
from importlib import resources

from flexport.backend import Capabilities
from flexport.errors import UsageError
from flexport.planner.machine import Computer, Curve, Machine, machine_from_dict
from flexport.units import VALUE_BYTES

__all__ = ["like", "shipped", "shipped_names"]

_FOLDER = resources.files("flexport.planner") / "machines"


def shipped_names() -> tuple[str, ...]:
    """The machines that come with flexport."""
    found = (entry.name for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))
    return tuple(sorted(name.removesuffix(".json") for name in found))


@lru_cache(maxsize=32)
def shipped(name: str) -> Machine:
    """One of them. Raises UsageError for a name that there is not."""
    if name not in shipped_names():
        raise UsageError(
            f"no machine named {name!r} comes with flexport; there are: {', '.join(shipped_names())}"
        )
    text = (_FOLDER / f"{name}.json").read_text(encoding="utf-8")
    return machine_from_dict(json.loads(text))


def like(backend: str, facts: Capabilities) -> Machine:
    """A machine that was not measured, with the numbers of the one that comes nearest to it.

    That is the one whose device has the same name; else the slowest with the same plug-in, else the
    slowest whose memory is of the same kind. What the device says of itself is taken from there, and
    the rest is as that machine has it.
    """
    same_memory = [
        machine
        for machine in map(shipped, shipped_names())
        if (machine.unified, machine.addressable) == (facts.unified, facts.addressable)
    ]

    def nearness(machine: Machine) -> tuple[int, bool, float]:
        device = machine.identity.get("device", "")
        # As a word: an M10 is no M1.
        named = bool(device) and re.search(rf"\b{re.escape(device)}\b", facts.name, re.IGNORECASE)
        fastest = max(machine.device.products[machine.dtypes[0]].flops_per_s)
        return len(device) if named else 0, machine.backend == backend, -fastest

    found = max(same_memory, key=nearness)
    return replace(
        found,
        about=f"{facts.name}, which was not measured, as if it were {found.name}",
        backend=backend,
        dtypes=facts.dtypes,
        page_tokens=facts.page_tokens,
        device_bytes=facts.memory_bytes,
        device=_able(found.device, facts.dtypes),
        host=None if found.host is None else _able(found.host, facts.dtypes),
        sources={"": f"estimated: as {found.name}"},
        identity={},
    )


def _able(computer: Computer, dtypes: tuple[str, ...]) -> Computer:
    """The same, with products in all of these: in what it has not as in the dtype of nearest size."""
    known = {form: curve for form, curve in computer.products.items() if form in VALUE_BYTES}
    added: dict[str, Curve] = {}
    for dtype in dtypes:
        if dtype not in known:
            size = VALUE_BYTES[dtype]
            nearest = min(sorted(known), key=lambda form: abs(VALUE_BYTES[form] - size))
            added[dtype] = known[nearest]
    return replace(computer, products={**computer.products, **added})

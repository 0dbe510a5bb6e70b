"""Machines that were measured, kept for later runs: one file for each, by what its numbers hold for.

Torch is not imported here: a plan, and a refusal, may come before it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import psutil

from flexport.backend import Capabilities
from flexport.checkpoint.packed import default_directory
from flexport.errors import BackendUnavailable, StorageError, UsageError
from flexport.planner.machine import Machine, read_machine
from flexport.registry import CPU, describe_backend

__all__ = ["identity_of", "known_machine", "path_of", "remember"]

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables that say how many cores torch computes on."""

_MOUNTS = Path("/proc/self/mountinfo")

_log = logging.getLogger(__name__)


def identity_of(
    backend: str, directory: Path, capabilities: Capabilities | None = None
) -> dict[str, str]:
    """What a machine's numbers hold for: where one of these is another, they are measured anew.

    The device is called as it describes itself without torch; where it does not, as
    `capabilities` have it.
    """
    processor, device = _described(CPU), _described(backend)
    if device is None:
        device = "" if capabilities is None else capabilities.name
    threads = [f"{name}={os.environ[name]}" for name in THREADS if os.environ.get(name)]
    return {
        "processor": processor or platform.processor() or platform.machine(),
        "cores": str(_num_cores()),
        "threads": " ".join(threads),
        "memory_bytes": str(psutil.virtual_memory().total),
        "backend": backend,
        "device": device,
        "disk": _disk_of(directory),
        "torch": _version("torch"),
        "flexport": _version("flexport"),
    }


def known_machine(
    backend: str, directory: Path, capabilities: Capabilities | None = None
) -> Machine | None:
    """This machine as `flexport profile` measured it, with the disk of a folder; None if it has not.

    Its free memory is what it was then.
    """
    identity = identity_of(backend, directory, capabilities)
    path = path_of(identity)
    if not path.exists():
        return None
    try:
        machine = read_machine(path)
    except UsageError as error:  # of another version's format, or torn
        _log.info("%s; measured anew by `flexport profile`", error)
        return None
    return machine if dict(machine.identity) == identity else None


def remember(machine: Machine) -> Path:
    """Keep a machine that was measured; returns its file. Raises StorageError."""
    path = path_of(machine.identity)
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(machine.to_json() + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise StorageError(
            f"can't keep the machine in {path}: {error.strerror or error}; name a folder that can be "
            "written to with FLEXPORT_CACHE=DIR in the environment"
        ) from error
    return path


def path_of(identity: Mapping[str, str]) -> Path:
    """Where a machine of this identity is kept."""
    text = json.dumps(dict(identity), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = identity["backend"].replace(":", "-")
    return default_directory() / "machines" / f"{name}-{digest}.json"


def _described(backend: str) -> str | None:
    try:
        facts = describe_backend(backend)
    except BackendUnavailable:  # one that nobody has registered, which was opened by hand
        return None
    return None if facts is None else facts.name


def _num_cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "unknown"


def _disk_of(directory: Path) -> str:
    """The mount that a folder, or the nearest one above it that exists, is on, and what is mounted."""
    path = directory.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    path = path.resolve()
    while not path.is_mount() and path != path.parent:
        path = path.parent
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return str(path)
    for line in reversed(lines):  # of mounts over each other, the last one shows
        mount, _, source = line.partition(" - ")
        if mount.split()[4] == str(path):
            kind, what, *_ = source.split()
            return f"{what} ({kind}) at {path}"
    return str(path)

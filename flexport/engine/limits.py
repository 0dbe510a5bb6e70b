"""What a run may use: the dtype it computes in, and the budgets of each tier."""

from __future__ import annotations

import shutil
from pathlib import Path

import psutil

from flexport.backend import Capabilities
from flexport.errors import UsageError
from flexport.planner.machine import Machine
from flexport.policy import Budgets
from flexport.units import format_bytes

__all__ = ["budgets_of", "default_budgets", "dtype_for"]

HOST_SHARE = 0.9
"""Of the host memory that is free now; the rest is for everybody else."""

DISK_SHARE = 0.9


def dtype_for(asked: str, capabilities: Capabilities, file_dtype: str | None) -> tuple[str, str]:
    """The dtype to compute in, and why. Raises UsageError if the device can't do it well."""
    known = capabilities.dtypes
    if asked != "auto":
        if asked not in known:
            raise UsageError(
                f"--dtype {asked} is not for {capabilities.name}, which computes in "
                f"{', '.join(known)}: {capabilities.dtype_reason}"
            )
        return asked, "as asked for"
    if file_dtype == "float32" and "float32" in known and known[0] != "float32":
        return known[0], f"{capabilities.dtype_reason}; the checkpoint has float32"
    if file_dtype is not None and file_dtype != known[0]:
        return known[0], f"{capabilities.dtype_reason}; the checkpoint has {file_dtype}"
    return known[0], capabilities.dtype_reason


def default_budgets(
    capabilities: Capabilities, asked: tuple[int | None, int | None, int | None], directory: Path
) -> Budgets:
    """The budgets asked for, and for those left open what is free.

    Where memory is unified, device and host are one pool, and either option caps it.
    """
    device, host, disk = asked
    if capabilities.unified:
        if device is None and host is None:
            device = capabilities.memory_bytes
        budget = (device or 0, host or 0)
    else:
        free_bytes = int(psutil.virtual_memory().available * HOST_SHARE)
        budget = (
            capabilities.memory_bytes if device is None else device,
            free_bytes if host is None else host,
        )
    if disk is None:
        disk = int(shutil.disk_usage(_existing(directory)).free * DISK_SHARE)
    free_bytes = shutil.disk_usage(_existing(directory)).free
    if disk > free_bytes:
        raise UsageError(
            f"--disk-memory is {format_bytes(disk)}, but {directory} has only "
            f"{format_bytes(free_bytes)} free; name another --offload-dir or a smaller size"
        )
    return Budgets(device_bytes=budget[0], host_bytes=budget[1], disk_bytes=disk)


def budgets_of(machine: Machine, asked: tuple[int | None, int | None, int | None]) -> Budgets:
    """The budgets asked for on a machine that is not here, and for those left open all it has."""
    device, host, disk = asked
    if machine.unified and (device is not None or host is not None):
        memory = (device or 0, host or 0)
    else:
        memory = (
            machine.device_bytes if device is None else device,
            machine.host_bytes if host is None else host,
        )
    return Budgets(
        device_bytes=memory[0],
        host_bytes=memory[1],
        disk_bytes=machine.disk_bytes if disk is None else disk,
    )


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that exists."""
    for candidate in (directory, *directory.absolute().parents):
        if candidate.is_dir():
            return candidate
    return Path()

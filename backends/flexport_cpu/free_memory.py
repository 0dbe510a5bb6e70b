"""Memory that a run may use: what the system or a cgroup has left, less a margin.

Free memory is what the operating system has left or what the innermost memory cgroup still
allows, whichever is less. Needs no torch.
"""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["cgroup_free_bytes", "usable_bytes"]

MARGIN_SHARE = 0.1
"""Left free for what no budget counts: the allocator's slack, the file system, other programs."""

MARGIN_BYTES = 128 << 20
"""And at least this: what torch, its kernels and its allocator take beyond what a run counts.
Measured as 80 to 95 MiB on OPT shapes of 125m and 1.3b."""

_MEMBERSHIP = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def usable_bytes() -> int:
    """Bytes that a run may use when the user sets no cap: what is free now, less a margin."""
    free_bytes: int = min([psutil.virtual_memory().available, *cgroup_free_bytes()])
    return max(0, free_bytes - max(MARGIN_BYTES, int(free_bytes * MARGIN_SHARE)))


def cgroup_free_bytes(membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> list[int]:
    """What each limited memory cgroup of this process still allows; page cache counts as free.

    `membership` and `cgroups` are where Linux shows them. A cgroup whose files can't be seen, as
    in some containers, is passed over.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found: list[int] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, used = cgroups, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = cgroups / "memory"
            limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.strip("/")
        above = [group, *group.parents]
        for directory in above[: above.index(root) + 1]:
            free_bytes = _free_in(directory, limit, used)
            if free_bytes is not None:
                found.append(free_bytes)
    return found


def _free_in(directory: Path, limit: str, used: str) -> int | None:
    """Limit less use of one cgroup, its page cache counted as free; None if it has no limit."""
    try:
        limit_bytes = int((directory / limit).read_text())
        used_bytes = int((directory / used).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_inactive_file" in stat else ""
        cache_bytes = int(stat[f"{prefix}inactive_file"]) + int(stat[f"{prefix}active_file"])
    except (OSError, ValueError, KeyError):
        return None
    return max(0, limit_bytes - used_bytes + cache_bytes)

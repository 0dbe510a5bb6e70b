"""A process under a real memory cap, and how much it held at most.

The cap is a memory cgroup, version 1 or 2, made for one process and removed after it; where this
user may not make one, systemd-run may. Page cache counts against it as much as the process's own
memory, so a model that is mapped from a file is really evicted and read again. Where there is
nothing of the kind the process is only watched, and the result says so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

__all__ = ["Cage", "CagedRun", "drop_cached", "open_cage", "run_caged"]

WATCH_EVERY_S = 0.05

_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")
_numbers = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class CagedRun:
    """How a process ended, and what it took."""

    exit_code: int
    output: str
    """Its stdout; stderr goes to ours."""
    seconds: float
    enforced_by: str
    """What held the cap: "cgroup v1", "cgroup v2", "systemd-run", or why nothing did."""
    cage_peak_bytes: int | None
    """The most that counted against the cap, page cache included; None if nothing counted."""
    anonymous_peak_bytes: int
    """The most memory of its own, files not counted, as sampled."""
    resident_peak_bytes: int
    """The most memory in RAM, mapped files included, as sampled."""


class Cage(Protocol):
    """What a process is put in."""

    @property
    def enforced_by(self) -> str:
        """For the result."""

    def command(self, command: Sequence[str]) -> list[str]:
        """What to start so that `command` runs inside, from its first byte on."""

    def peak_bytes(self, pid: int) -> int | None:
        """The most that counted so far, the process being alive or dead."""


class _None:
    """No cage: the process runs free."""

    def __init__(self, reason: str) -> None:
        self.enforced_by = reason

    def command(self, command: Sequence[str]) -> list[str]:
        return list(command)

    def peak_bytes(self, pid: int) -> int | None:
        return None


class _Group:
    """A cgroup of our own."""

    def __init__(self, path: Path, enforced_by: str, peak: str) -> None:
        self.enforced_by = enforced_by
        self._path = path
        self._peak = path / peak

    def command(self, command: Sequence[str]) -> list[str]:
        # The shell joins the group and then becomes the command, whose memory all counts.
        join = f'echo $$ > "{self._path / "cgroup.procs"}" && exec "$@"'
        return ["sh", "-c", join, "sh", *command]

    def peak_bytes(self, pid: int) -> int | None:
        return _number_in(self._peak)


class _Scope:
    """A transient scope of systemd, which puts the process in a cgroup of its own."""

    enforced_by = "systemd-run"

    def __init__(self, cap_bytes: int, user: bool) -> None:
        self._options = [*(["--user"] if user else []), "--scope", "--quiet", "--collect"]
        self._limits = ["-p", f"MemoryMax={cap_bytes}", "-p", "MemorySwapMax=0"]
        self._seen_bytes: int | None = None

    def command(self, command: Sequence[str]) -> list[str]:
        return ["systemd-run", *self._options, *self._limits, "--", *command]

    def peak_bytes(self, pid: int) -> int | None:
        # The group is gone as soon as the process is, so what was seen last counts.
        with contextlib.suppress(OSError, IndexError):
            lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
            path = next(line.split(":", 2)[2] for line in lines if line.startswith("0::"))
            found = _number_in(_V2 / path.lstrip("/") / "memory.peak")
            self._seen_bytes = found or self._seen_bytes
        return self._seen_bytes


@contextlib.contextmanager
def open_cage(cap_bytes: int | None) -> Iterator[Cage]:
    """The best cage that this user can have here; gone, with its processes, at the end."""
    if cap_bytes is None:
        yield _None("no cap was asked for")
        return
    for make in (_make_v1, _make_v2):
        path = make(cap_bytes)
        if path is None:
            continue
        version, peak = (
            ("cgroup v1", "memory.max_usage_in_bytes")
            if make is _make_v1
            else ("cgroup v2", "memory.peak")
        )
        try:
            yield _Group(path, version, peak)
        finally:
            _remove(path)
        return
    scope = _scope(cap_bytes)
    yield scope or _None("nothing: no memory cgroup can be made here, the process was watched")


def run_caged(command: Sequence[str], cap_bytes: int | None, timeout_s: float) -> CagedRun:
    """Run a command to its end in a cage of its own; kills it after timeout_s.

    A process that the cap killed has exit code -9.
    """
    with open_cage(cap_bytes) as cage:
        started_s = time.perf_counter()
        with subprocess.Popen(  # noqa: S603 - commands come from this package
            cage.command(command), stdout=subprocess.PIPE, text=True
        ) as process:
            watch = _Watch(process.pid, cage)
            killer = threading.Timer(timeout_s, process.kill)
            killer.start()
            try:
                output, _ = process.communicate()
            except BaseException:
                process.kill()
                raise
            finally:
                killer.cancel()
                watch.stop()
        return CagedRun(
            exit_code=process.returncode,
            output=output,
            seconds=time.perf_counter() - started_s,
            enforced_by=cage.enforced_by,
            cage_peak_bytes=cage.peak_bytes(process.pid),
            anonymous_peak_bytes=watch.anonymous_bytes,
            resident_peak_bytes=watch.resident_bytes,
        )


def drop_cached(path: Path) -> None:
    """Take a file's pages out of the page cache.

    Pages in the cache count against whoever touched them first, so a capped process could use
    those of an earlier one for free.
    """
    if sys.platform == "linux":
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


class _Watch:
    """Looks at a process every few hundredths of a second."""

    def __init__(self, pid: int, cage: Cage) -> None:
        self.anonymous_bytes = 0
        self.resident_bytes = 0
        self._pid = pid
        self._cage = cage
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(WATCH_EVERY_S):
            with contextlib.suppress(psutil.Error, OSError):
                memory = psutil.Process(self._pid).memory_info()
                # Linux counts mapped files as shared; elsewhere there is no such number.
                anonymous_bytes = memory.rss - getattr(memory, "shared", 0)
                self.anonymous_bytes = max(self.anonymous_bytes, anonymous_bytes)
                self.resident_bytes = max(self.resident_bytes, memory.rss)
            self._cage.peak_bytes(self._pid)


# ---- making cgroups


def _make_v1(cap_bytes: int) -> Path | None:
    path = _V1 / _name()
    if not (_V1 / "memory.limit_in_bytes").exists():
        return None
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(cap_bytes))
    except OSError:
        _remove(path)
        return None
    with contextlib.suppress(OSError):  # a kernel that does not count swap
        (path / "memory.memsw.limit_in_bytes").write_text(str(cap_bytes))
    return path


def _make_v2(cap_bytes: int) -> Path | None:
    if not (_V2 / "cgroup.controllers").exists():
        return None
    for parent in _v2_parents():
        path = parent / _name()
        try:
            with contextlib.suppress(OSError):  # it is on already, or it is not ours to set
                (parent / "cgroup.subtree_control").write_text("+memory")
            path.mkdir()
            (path / "memory.max").write_text(str(cap_bytes))
        except OSError:
            _remove(path)
            continue
        with contextlib.suppress(OSError):  # a machine without swap
            (path / "memory.swap.max").write_text("0")
        return path
    return None


def _v2_parents() -> list[Path]:
    """Groups that may have children with a limit: the root, then those above our own."""
    own = _V2
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line.startswith("0::"):
                own = _V2 / line[3:].lstrip("/")
    above = [path for path in own.parents if path.is_relative_to(_V2)]
    return [_V2, *(path for path in reversed(above) if path != _V2)]


def _scope(cap_bytes: int) -> _Scope | None:
    if shutil.which("systemd-run") is None:
        return None
    for user in (False, True):
        scope = _Scope(cap_bytes, user)
        try:
            subprocess.run(scope.command(["true"]), check=True, capture_output=True, timeout=20)  # noqa: S603 - our own words
        except (OSError, subprocess.SubprocessError):
            continue
        return scope
    return None


def _name() -> str:
    return f"flexport-bench-{os.getpid()}-{next(_numbers)}"


def _remove(path: Path) -> None:
    """Remove a group; its processes have ended, and the kernel may take a moment to see it."""
    for _ in range(50):
        try:
            path.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.02)
        else:
            return


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

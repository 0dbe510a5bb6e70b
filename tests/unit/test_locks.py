"""A lock is one's alone or shared by many, and is free when its owner is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from flexport.locks import try_lock, try_share


class RangeLocks:
    """Windows' locks: each descriptor has ranges of bytes, which no other's may touch."""

    LK_NBLCK = 2

    def __init__(self) -> None:
        self.ranges: list[tuple[int, range]] = []

    def locking(self, fd: int, mode: int, num_bytes: int) -> None:
        assert mode == self.LK_NBLCK
        begin = os.lseek(fd, 0, os.SEEK_CUR)
        wanted = range(begin, begin + num_bytes)
        for _, taken in self.ranges:
            if wanted.start < taken.stop and taken.start < wanted.stop:
                raise PermissionError(13, "Permission denied")
        self.ranges.append((fd, wanted))

    def close(self, fd: int) -> None:
        self.ranges = [each for each in self.ranges if each[0] != fd]
        os.close(fd)


@pytest.fixture(params=["own", "windows"])
def system(request, monkeypatch):
    """What closes descriptors: this system, or another one's locks."""
    if request.param == "windows" and sys.platform != "win32":
        locks = RangeLocks()
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setitem(sys.modules, "msvcrt", locks)
        return locks
    return SimpleNamespace(close=os.close)


@pytest.fixture
def opened(system, tmp_path):
    """opened(): one more descriptor of the same file."""
    fds = []

    def get():
        fds.append(os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT))
        return fds[-1]

    yield get
    for fd in fds:
        system.close(fd)


def test_many_share_a_lock_that_then_nobody_has_alone(opened):
    assert [try_share(opened()) for _ in range(3)] == [True] * 3
    assert not try_lock(opened())


def test_a_lock_that_somebody_has_alone_is_not_shared(opened):
    assert try_lock(opened())
    assert not try_lock(opened())
    assert not try_share(opened())


def test_the_last_that_shared_it_leaves_it_free(system, tmp_path):
    fds = [os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(3)]
    assert try_share(fds[0])
    assert try_share(fds[1])

    system.close(fds[0])
    still_shared = not try_lock(fds[2])
    system.close(fds[1])
    free = try_lock(fds[2])
    system.close(fds[2])

    assert still_shared
    assert free


_SHARE = """
import os, sys
from flexport.locks import try_share
print(try_share(os.open(sys.argv[1], os.O_RDWR)), flush=True)
sys.stdin.readline()
"""


def test_a_killed_process_shares_it_no_longer(tmp_path):
    path = tmp_path / "lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    with subprocess.Popen(
        [sys.executable, "-c", _SHARE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        told = process.stdout.readline().split()
        while_it_lives = try_lock(fd)
        process.kill()
    afterwards = try_lock(fd)
    os.close(fd)

    assert told == [b"True"]
    assert (while_it_lives, afterwards) == (False, True)

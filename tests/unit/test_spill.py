"""Extents of the spill file: disjoint, reused, and refused before a byte is written."""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexport.errors import DiskFull, StorageError
from flexport.store.direct_io import ALIGNMENT, AlignedBuffer
from flexport.store.spill import Extent, SpillFile


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.one_of(st.integers(1, 5 * ALIGNMENT), st.integers(-10, -1)), max_size=60))
def test_extents_never_overlap_and_giving_all_back_leaves_one_hole(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int]
) -> None:
    path = tmp_path_factory.getbasetemp() / "spill_property"
    path.unlink(missing_ok=True)
    out: list[Extent] = []
    with SpillFile(path, 64 * ALIGNMENT) as spill:
        for step in steps:
            if step > 0:
                try:
                    extent = spill.take(step)
                except DiskFull:
                    assert spill.size_bytes + step > spill.budget_bytes
                    continue
                assert extent.num_bytes >= step
                assert extent.offset_bytes % ALIGNMENT == extent.num_bytes % ALIGNMENT == 0
                assert all(
                    extent.stop_bytes <= other.offset_bytes
                    or other.stop_bytes <= extent.offset_bytes
                    for other in out
                )
                out.append(extent)
            elif out:
                spill.give_back(out.pop(step % len(out)))
            assert spill.used_bytes == sum(extent.num_bytes for extent in out)
            assert spill.used_bytes <= spill.size_bytes <= spill.budget_bytes
            assert path.stat().st_size == spill.size_bytes
        for extent in out:
            spill.give_back(extent)

        peak_before = spill.peak_bytes
        whole = spill.take(spill.budget_bytes)

        assert whole == Extent(offset_bytes=0, num_bytes=64 * ALIGNMENT)
        assert peak_before <= spill.peak_bytes == 64 * ALIGNMENT


def test_the_tightest_hole_is_taken(tmp_path: Path) -> None:
    with SpillFile(tmp_path / "s", 1 << 20) as spill:
        wide, _, tight, _ = [spill.take(pages * ALIGNMENT) for pages in (3, 1, 2, 1)]
        spill.give_back(wide)
        spill.give_back(tight)

        again = spill.take(2 * ALIGNMENT - 5)

        assert again == tight


def test_a_budget_that_is_used_up_is_told_with_numbers(tmp_path: Path) -> None:
    with SpillFile(tmp_path / "s", 1 << 20) as spill:
        spill.take(1 << 19)

        with pytest.raises(DiskFull) as caught:
            spill.take((1 << 19) + 1)

        for part in ("1.00 MiB", "516.00 KiB more", "512.00 KiB are in use", "--disk-memory"):
            assert part in str(caught.value)
        assert spill.used_bytes == spill.size_bytes == 1 << 19


def test_an_extent_given_back_twice_is_caught(tmp_path: Path) -> None:
    with SpillFile(tmp_path / "s", 1 << 20) as spill:
        extent, _ = spill.take(5000), spill.take(5000)
        spill.give_back(extent)

        with pytest.raises(AssertionError):
            spill.give_back(extent)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is not reserved here")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_shows_when_space_is_taken_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(*_: int) -> None:
        raise OSError(number, os.strerror(number))

    with SpillFile(tmp_path / "s", 1 << 30) as spill:
        first = spill.take(8192)
        monkeypatch.setattr(os, "posix_fallocate", full)

        with pytest.raises(DiskFull, match=rf"can't allocate 4.00 KiB .*{os.strerror(number)}"):
            spill.take(1)
        spill.give_back(first)

        assert spill.take(8192) == first


def test_where_space_cannot_be_reserved_the_free_space_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate", raising=False)

    with SpillFile(tmp_path / "s", 1 << 60) as spill:
        spill.take(10_000)
        with pytest.raises(DiskFull, match=r"the disk has .* free"):
            spill.take(1 << 59)

        assert (tmp_path / "s").stat().st_size == spill.size_bytes == 12_288


def test_another_failure_of_the_disk_is_not_called_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "posix_fallocate", broken, raising=False)
    if sys.platform == "win32":
        monkeypatch.setattr(os, "truncate", broken)

    with (
        SpillFile(tmp_path / "s", 1 << 20) as spill,
        pytest.raises(StorageError, match="Input/output error") as caught,
    ):
        spill.take(1)

    assert not isinstance(caught.value, DiskFull)


def test_threads_get_disjoint_extents(tmp_path: Path) -> None:
    taken: list[Extent] = []
    with SpillFile(tmp_path / "s", 1 << 24) as spill:

        def work() -> None:
            for index in range(50):
                extent = spill.take(1 + index * 100)
                if index % 2:
                    spill.give_back(extent)
                else:
                    taken.append(extent)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    taken.sort(key=lambda extent: extent.offset_bytes)
    assert len(taken) == 100
    assert all(a.stop_bytes <= b.offset_bytes for a, b in itertools.pairwise(taken))


def test_a_really_full_file_system_is_refused_at_allocation(tmp_path: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("needs root, to mount a tiny file system")
    mount = tmp_path / "tiny"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with SpillFile(mount / "s", 1 << 30) as spill:
            kept = spill.take(1 << 19)
            spill.file.write_from(AlignedBuffer(1 << 19).bytes_B.fill_(9), kept.offset_bytes)
            with pytest.raises(DiskFull, match="No space left"):
                spill.take(1 << 20)

            back_B = AlignedBuffer(1 << 19).bytes_B
            spill.file.read_into(back_B, kept.offset_bytes)

            assert bool((back_B == 9).all())
    finally:
        subprocess.run(["umount", str(mount)], check=True)

"""The run directory: gone after any end of its run, and never anyone else's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flexport.errors import UsageError
from flexport.store import run_dir
from flexport.store.run_dir import RunDir

_OPEN_AND_WAIT = """
import sys
from pathlib import Path
from flexport.store.run_dir import RunDir
run = RunDir(Path(sys.argv[1]))
(run.path / "spill").write_bytes(b"x" * 100)
(run.path / "deep").mkdir()
(run.path / "deep" / "er").write_bytes(b"x")
print(run.path, flush=True)
sys.stdin.readline()
"""


def _start(offload_dir: Path) -> tuple[subprocess.Popen[str], Path]:
    """A process that holds a run directory until its stdin closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _OPEN_AND_WAIT, str(offload_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_the_directory_is_removed_with_all_in_it(tmp_path: Path) -> None:
    with RunDir(tmp_path / "made" / "for it") as run:
        (run.path / "a").write_bytes(b"1")
        (run.path / "b").mkdir()
        (run.path / "b" / "c").write_bytes(b"1")
        was_there = run.path.is_dir()

    run.close()
    assert was_there
    assert list((tmp_path / "made" / "for it").iterdir()) == []


def test_an_error_on_its_way_removes_the_directory_too(tmp_path: Path) -> None:
    def break_off() -> None:
        with RunDir(tmp_path) as run:
            (run.path / "a").write_bytes(b"1")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()

    assert list(tmp_path.iterdir()) == []


def test_a_process_that_just_ends_leaves_nothing(tmp_path: Path) -> None:
    process, path = _start(tmp_path)
    was_there = path.is_dir()

    process.communicate("")

    assert was_there
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    process, path = _start(tmp_path)
    _kill(process)
    left = (path / "deep" / "er").exists()

    with RunDir(tmp_path) as run:
        found = list(tmp_path.iterdir())

    assert left
    assert found == [run.path]


def test_a_live_run_is_left_alone_by_others_of_its_own_and_other_processes(tmp_path: Path) -> None:
    process, path = _start(tmp_path)

    with RunDir(tmp_path) as mine, RunDir(tmp_path) as other:
        found = set(tmp_path.iterdir())
    alive = (path / "spill").exists()
    process.communicate("")

    assert found == {path, mine.path, other.path}
    assert alive


def test_only_directories_with_our_name_and_lock_are_removed(tmp_path: Path) -> None:
    name = "flexport-run-1-0123456789abcde"
    strangers = [
        tmp_path / "photos",
        tmp_path / f"{name}g",
        tmp_path / f"{name}",
        tmp_path / "lock",
    ]
    for stranger in strangers[:3]:
        stranger.mkdir()
        (stranger / "lock").write_bytes(b"")
        (stranger / "dear").write_bytes(b"1")
    strangers[3].write_bytes(b"")
    lockless = tmp_path / f"{name}1"
    lockless.mkdir()
    (lockless / "dear").write_bytes(b"1")
    file = tmp_path / f"{name}2"
    file.write_bytes(b"1")

    RunDir(tmp_path).close()

    assert set(tmp_path.iterdir()) == {*strangers, lockless, file}
    assert (lockless / "dear").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "dear").write_bytes(b"1")
    (outside / "lock").write_bytes(b"")
    offload = tmp_path / "offload"
    dead = offload / "flexport-run-1-0123456789abcdef"
    dead.mkdir(parents=True)
    (dead / "lock").write_bytes(b"")
    (dead / "link").symlink_to(outside)
    named = offload / "flexport-run-2-0123456789abcdef"
    named.symlink_to(outside)

    RunDir(offload).close()

    assert not dead.exists()
    assert named.is_symlink()
    assert (outside / "dear").exists()


def test_a_run_that_died_before_its_lock_was_made_is_removed(tmp_path: Path) -> None:
    (tmp_path / "flexport-run-1-0123456789abcdef").mkdir()

    RunDir(tmp_path).close()

    assert list(tmp_path.iterdir()) == []


def test_a_run_swept_away_while_it_starts_takes_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_mkdir, whole_lock = Path.mkdir, run_dir._lock
    swept: list[str] = []

    def mkdir_then_swept(
        path: Path, mode: int = 0o777, parents: bool = False, exist_ok: bool = False
    ) -> None:
        whole_mkdir(path, mode, parents, exist_ok)
        if path.name.startswith("flexport-run-") and not swept:
            swept.append("before its lock was made")
            path.rmdir()

    def swept_then_lock(lock_fd: int, path: Path) -> bool:
        if len(swept) == 1 and sys.platform != "win32":
            swept.append("before its lock was taken")
            (path / "lock").unlink()
            path.rmdir()
        return whole_lock(lock_fd, path)

    monkeypatch.setattr(Path, "mkdir", mkdir_then_swept)
    monkeypatch.setattr(run_dir, "_lock", swept_then_lock)

    with RunDir(tmp_path) as run:
        found = list(tmp_path.iterdir())

    assert found == [run.path]
    assert swept


def test_runs_that_start_and_stop_at_once_never_take_each_others_directory(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from flexport.store.run_dir import RunDir
for _ in range(100):
    with RunDir(Path(sys.argv[1])) as run:
        (run.path / "mine").write_bytes(b"1")
        assert (run.path / "mine").exists()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]

    errors = [process.communicate()[1] for process in processes]

    assert errors == ["", "", ""]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_does_not_remove_its_parents_directory(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        child = os.fork()
        if child == 0:
            run.close()
            os._exit(0)
        os.waitpid(child, 0)

        assert run.path.is_dir()


def test_an_offload_directory_that_cannot_be_used_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")

    with pytest.raises(UsageError, match=r"offload directory .*file.*--offload-dir"):
        RunDir(file / "below")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    process, _ = _start(tmp_path)

    process.send_signal(signal.SIGINT)
    process.communicate()

    assert list(tmp_path.iterdir()) == []

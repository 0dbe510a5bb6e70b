"""The cache of packed weights: found again by content, whole or not there, and never damaged."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from flexport.checkpoint import packed
from flexport.checkpoint.digests import Digests, hub_digest, stamp_of
from flexport.checkpoint.header import read_header
from flexport.checkpoint.packed import Manifest, PackedCache, default_directory
from flexport.checkpoint.writer import PAGE_BYTES, FileLayout, NewTensor, new_file
from flexport.errors import CheckpointError, DiskFull, DoesNotFit, StorageError, UsageError
from flexport.locks import try_lock

KEY = "0123456789abcdef"
BLANK = Manifest(
    model="m",
    revision=None,
    content="c",
    codec="int4-64-1",
    num_values=8,
    source_bytes=16,
    flexport="0",
    created="now",
)
NAMES = ("a", "b")


def nobody():
    raise AssertionError("nobody else has the lock")


def filled(cache):
    """A whole entry of two files."""
    entry = cache.entry(KEY)
    with entry.locked(nobody):
        manifest = BLANK
        for name in NAMES:
            manifest = entry.add(
                manifest, name, 3, lambda file, name=name: file.write(b"%b12" % name.encode())
            )
        entry.complete(manifest)
    return entry


# ---- where


@pytest.mark.skipif(sys.platform == "win32", reason="other systems' directories")
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FLEXPORT_CACHE": "/big/disk"}, "/big/disk"),
        ({"FLEXPORT_CACHE": "~/big"}, "{home}/big"),
        ({"XDG_CACHE_HOME": "/caches"}, "/caches/flexport"),
        ({"XDG_CACHE_HOME": "not/absolute"}, "{home}/.cache/flexport"),
        ({}, "{home}/.cache/flexport"),
        ({"FLEXPORT_CACHE": ""}, "{home}/.cache/flexport"),
    ],
)
def test_the_cache_is_where_the_user_or_the_system_has_it(monkeypatch, environment, expected):
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("FLEXPORT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert default_directory() == Path(expected.format(home=Path.home()))


def test_apple_and_windows_have_directories_of_their_own(monkeypatch, tmp_path):
    monkeypatch.delenv("FLEXPORT_CACHE", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "darwin")
    apple = default_directory()
    monkeypatch.setattr(sys, "platform", "win32")
    windows = default_directory()

    assert apple == Path.home() / "Library" / "Caches" / "flexport"
    assert windows == tmp_path / "flexport"


def test_a_cache_that_cant_be_made_is_told_with_what_would_work(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    with (
        pytest.raises(UsageError, match="FLEXPORT_CACHE=DIR"),
        PackedCache(tmp_path / "file").entry(KEY).locked(nobody),
    ):
        pass


# ---- digests


def test_a_file_is_read_once_for_as_long_as_nobody_touches_it(tmp_path):
    path = tmp_path / "x"
    read: list[int] = []
    path.write_bytes(b"abc")

    first = Digests(tmp_path / "digests.json").of(path, read.append)
    again = Digests(tmp_path / "digests.json").of(path, read.append)

    assert first == again == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert read == [3]


@pytest.mark.skipif(sys.platform == "win32", reason="has no time of change")
def test_bytes_that_changed_show_though_the_time_of_writing_was_set_back(tmp_path):
    path, digests = tmp_path / "x", Digests(tmp_path / "digests.json")
    path.write_bytes(b"abc")
    before = digests.of(path)
    facts = path.stat()

    path.write_bytes(b"abd")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    assert path.stat().st_mtime_ns == facts.st_mtime_ns
    assert digests.known(path) is None
    assert digests.of(path) != before


def test_a_file_that_changes_while_it_is_read_has_no_digest(tmp_path):
    path, digests = tmp_path / "x", Digests(tmp_path / "digests.json")
    path.write_bytes(b"abc")

    with pytest.raises(CheckpointError, match="changed while it was read"):
        digests.of(path, lambda _: path.write_bytes(b"longer"))

    assert digests.known(path) is None


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": 1}', '{"a": [[1], "b"]}', "null", "[" * 9999]
)
def test_a_memory_that_cant_be_read_is_no_memory(tmp_path, text):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    (tmp_path / "digests.json").write_text(text)

    digests = Digests(tmp_path / "digests.json")

    assert digests.known(path) is None
    assert Digests(tmp_path / "digests.json").known(path) is None
    assert digests.of(path) == Digests(tmp_path / "digests.json").known(path)


def test_what_another_process_remembered_meanwhile_is_kept(tmp_path):
    one, other = Digests(tmp_path / "digests.json"), Digests(tmp_path / "digests.json")
    for name in ("x", "y", "z"):
        (tmp_path / name).write_bytes(name.encode())
    one.of(tmp_path / "x")
    other.of(tmp_path / "y")
    (tmp_path / "x").unlink()

    other.of(tmp_path / "z")

    found = json.loads((tmp_path / "digests.json").read_text())
    assert sorted(Path(name).name for name in found) == ["y", "z"]  # x is gone


def test_a_memory_that_cant_be_written_costs_time_only(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")

    assert Digests(tmp_path / "x" / "digests.json").of(tmp_path / "x").startswith("ba7816")


def test_what_was_read_first_is_remembered_though_there_was_no_cache_yet(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    missing = tmp_path / "caches" / "flexport"

    PackedCache(missing).digests.of(tmp_path / "x")

    assert PackedCache(missing).digests.known(tmp_path / "x") is not None


def test_only_a_blob_of_the_hubs_cache_is_called_by_its_digest(tmp_path):
    digest = "ab" * 32
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in (digest, "cd" * 20):
        (blobs / name).write_bytes(b"")
    (snapshot / "large").symlink_to(Path("../../blobs") / digest)
    (snapshot / "small").symlink_to(Path("../../blobs") / ("cd" * 20))
    (tmp_path / digest).write_bytes(b"")

    assert hub_digest(snapshot / "large") == digest
    assert hub_digest(snapshot / "small") is None
    assert hub_digest(tmp_path / digest) is None


# ---- entries


def test_an_entry_is_there_when_it_is_whole(tmp_path):
    cache = PackedCache(tmp_path)
    entry = cache.entry(KEY)
    with entry.locked(nobody):
        manifest = entry.add(BLANK, "a", 1, lambda file: file.write(b"a"))
        before = (entry.manifest(), entry.unfinished())
        entry.complete(manifest)

    assert before == (None, manifest)
    assert entry.manifest() == manifest
    assert entry.unfinished() is None
    assert [each.key for each in cache.entries()] == [KEY]


def test_a_sound_entry_is_not_read_again(tmp_path, monkeypatch):
    manifest = filled(PackedCache(tmp_path)).manifest()
    monkeypatch.setattr(Digests, "read", lambda *_: pytest.fail("it was read"))
    entry = PackedCache(tmp_path).entry(KEY)

    entry.check(manifest, NAMES)

    assert entry.unknown_bytes(manifest) == 0


def test_a_copied_cache_is_read_once_and_then_known(tmp_path):
    filled(PackedCache(tmp_path / "one"))
    (tmp_path / "one").rename(tmp_path / "two")
    entry = PackedCache(tmp_path / "two").entry(KEY)
    read: list[int] = []

    manifest = entry.manifest()
    assert manifest is not None
    unknown = entry.unknown_bytes(manifest)
    entry.check(manifest, NAMES, read.append)
    entry.check(manifest, NAMES, read.append)

    assert unknown == 6
    assert read == [3, 3]


def flip(path):
    facts = path.stat()
    path.write_bytes(b"xyz")
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (flip, "bytes have changed"),
        (lambda path: path.write_bytes(b"x"), "has 1 bytes, and was written with 3"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
def test_damage_is_told_by_the_files_name_with_what_to_do(tmp_path, damage, told):
    entry = filled(PackedCache(tmp_path))
    damage(entry.directory / "b")

    with pytest.raises(CheckpointError) as error:
        PackedCache(tmp_path).entry(KEY).check(entry.manifest(), NAMES)

    assert f"{entry.directory / 'b'} {told}" in str(error.value) or told in str(error.value)
    assert str(entry.directory / "b") in str(error.value)
    assert str(entry.directory / "a") not in str(error.value)
    assert f"flexport pack --remove {KEY}" in str(error.value)
    assert "--overwrite" in str(error.value)


def test_to_verify_is_to_read_what_is_known_too(tmp_path):
    entry = filled(PackedCache(tmp_path))
    read: list[int] = []

    entry.check(entry.manifest(), NAMES, read.append, read_all=True)

    assert read == [3, 3]


def test_a_manifest_without_a_file_that_is_needed_is_damage(tmp_path):
    entry = filled(PackedCache(tmp_path))

    with pytest.raises(CheckpointError, match="does not have c"):
        entry.check(entry.manifest(), [*NAMES, "c"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"version": 2}, "version 2, and this flexport reads 1"),
        ({"version": None}, "version None"),
        ({"files": None}, "not what flexport writes"),
        ({"files": {"a": {"size": 1}}}, "not what flexport writes"),
        ({"more": 1}, "not what flexport writes"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused_and_can_be_removed(tmp_path, change, told):
    cache = PackedCache(tmp_path)
    entry = filled(cache)
    path = entry.directory / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    with pytest.raises(CheckpointError, match=told):
        entry.manifest()

    entry.remove()
    assert cache.entries() == []


@pytest.mark.parametrize("text", ["", "{", "[]", "7"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path, text):
    entry = filled(PackedCache(tmp_path))
    (entry.directory / "manifest.json").write_text(text)

    with pytest.raises(CheckpointError, match=r"manifest\.json can't be used"):
        entry.manifest()


def test_removing_leaves_nothing_and_no_other_entry_less(tmp_path):
    cache = PackedCache(tmp_path)
    filled(cache)
    other = cache.entry("f" * 16)
    with other.locked(nobody):
        other.complete(other.add(BLANK, "a", 1, lambda file: file.write(b"a")))

    cache.find("0123").remove()

    assert [entry.key for entry in cache.entries()] == ["f" * 16]
    assert not (tmp_path / "packed" / KEY).exists()


def test_an_entry_is_named_by_the_beginning_of_its_key(tmp_path):
    cache = PackedCache(tmp_path)
    filled(cache)
    with cache.entry("0123" + "f" * 12).locked(nobody):
        pass

    for start in ("", "0123", "9"):
        with pytest.raises(UsageError, match=KEY):
            cache.find(start)

    assert cache.find("01234").key == KEY


def test_what_is_being_packed_is_not_removed(tmp_path):
    entry = filled(PackedCache(tmp_path))

    with entry.locked(nobody), pytest.raises(UsageError, match=f"{KEY}.*another process packs it"):
        PackedCache(tmp_path).entry(KEY).remove()

    assert entry.manifest() is not None


def test_what_is_in_use_is_not_removed_before_the_last_is_done(tmp_path):
    entry = filled(PackedCache(tmp_path))

    with entry.in_use() as first:
        with PackedCache(tmp_path).entry(KEY).in_use() as second:
            pass
        with pytest.raises(UsageError, match=f"{KEY}.*a run streams from it"):
            PackedCache(tmp_path).entry(KEY).remove()
        left = entry.manifest()
    entry.remove()

    assert first == second == left is not None
    assert not entry.directory.exists()


def test_what_is_packed_or_not_whole_is_not_in_use(tmp_path):
    entry = PackedCache(tmp_path).entry(KEY)
    found = []

    with entry.in_use() as manifest:
        found.append(manifest)
    made_nothing = not entry.directory.exists()
    filled(PackedCache(tmp_path))
    with entry.locked(nobody), entry.in_use() as manifest:
        found.append(manifest)

    assert found == [None, None]
    assert made_nothing


def test_a_cache_without_locks_can_be_used(tmp_path, monkeypatch):
    entry = filled(PackedCache(tmp_path))

    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(packed, "try_share", fail)
    with entry.in_use() as without_locks:
        pass
    monkeypatch.setattr(os, "open", fail)
    with entry.in_use() as without_file:
        pass

    assert without_locks == without_file == entry.manifest() is not None


def test_the_second_to_pack_waits_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_POLL_S", 0.001)
    entry, order, told = PackedCache(tmp_path).entry(KEY), [], threading.Event()

    def second():
        with PackedCache(tmp_path).entry(KEY).locked(told.set):
            order.append("second")

    with entry.locked(nobody):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(60)
        order.append("first")
    thread.join(60)

    assert order == ["first", "second"]


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is open can't be removed there")
def test_who_waited_for_an_entry_that_was_removed_makes_it_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "_POLL_S", 0.001)
    entry, told = filled(PackedCache(tmp_path)), threading.Event()
    there: list[str] = []

    def second():
        with PackedCache(tmp_path).entry(KEY).locked(told.set):
            there.extend(path.name for path in entry.directory.iterdir())

    with entry.locked(nobody):
        thread = threading.Thread(target=second)
        thread.start()
        assert told.wait(60)
        entry.clear()
        (entry.directory / "lock").unlink()
        with suppress(OSError):  # it may be quicker than we are
            entry.directory.rmdir()
    thread.join(60)

    assert there == ["lock"]


@pytest.mark.skipif(sys.platform == "win32", reason="a file that is open can't be removed there")
def test_a_lock_whose_file_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    entry, tries = PackedCache(tmp_path).entry(KEY), []

    def removed_then_lock(fd):
        tries.append(fd)
        if len(tries) == 1:
            (entry.directory / "lock").unlink()
        return try_lock(fd)

    monkeypatch.setattr(packed, "try_lock", removed_then_lock)
    with entry.locked(lambda: None):
        there = (entry.directory / "lock").exists()

    assert len(tries) == 2
    assert there


def test_clearing_takes_the_manifest_first_and_leaves_what_is_to_be_kept(tmp_path, monkeypatch):
    entry, gone = filled(PackedCache(tmp_path)), []
    (entry.directory / "a.part-1").write_bytes(b"")
    unlink, iterdir = Path.unlink, Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda path: iter(sorted(iterdir(path))))

    def noted(path, missing_ok=False):
        gone.append(path.name)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", noted)

    with entry.locked(nobody):
        entry.clear(keep={"b": entry.manifest().files["b"]})

    assert gone[0] == "manifest.json"
    assert sorted(path.name for path in entry.directory.iterdir()) == ["b", "lock"]


def test_a_disk_that_is_too_small_is_refused_with_the_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    entry = filled(PackedCache(tmp_path))

    entry.require_room(5 << 20)
    with pytest.raises(DoesNotFit, match=r"5\.00 MiB.* 5\.00 MiB left.*FLEXPORT_CACHE"):
        entry.require_room((5 << 20) + 1)


class Usage:
    free = 5 << 20


# ---- files


def test_tensors_lie_where_the_layout_says_and_the_data_starts_on_a_page(tmp_path):
    layout = FileLayout(
        [
            NewTensor(name="a", dtype="uint8", shape=(2, PAGE_BYTES)),
            NewTensor(name="b", dtype="bfloat16", shape=(3,)),
            NewTensor(name="c", dtype="float32", shape=(1, 2)),
        ]
    )

    with new_file(tmp_path / "f", layout.num_bytes, "things") as file:
        file.write(layout.header)
        file.truncate(layout.num_bytes)

    found = read_header(tmp_path / "f")
    assert {name: tensor.offset_bytes for name, tensor in found.items()} == layout.offsets_bytes
    assert layout.offsets_bytes["a"] % PAGE_BYTES == layout.offsets_bytes["b"] % PAGE_BYTES == 0
    assert [tensor.dtype for tensor in found.values()] == ["uint8", "bfloat16", "float32"]
    assert (tmp_path / "f").stat().st_size == layout.num_bytes


def test_a_file_that_is_not_whole_never_has_its_name(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"old")

    def break_off():
        with new_file(path, 3, "things") as file:
            file.write(b"new")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()

    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("number", "kind"), [(28, DiskFull), (5, StorageError)])
def test_an_error_of_the_disk_leaves_the_files_before_it_for_the_next_try(
    tmp_path, monkeypatch, number, kind
):
    entry = PackedCache(tmp_path).entry(KEY)
    with entry.locked(nobody):
        manifest = entry.add(BLANK, "a", 1, lambda file: file.write(b"a"))

        def fail(fd):
            raise OSError(number, "a reason")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(kind, match=r"packed weights to .*b: a reason"):
            entry.add(manifest, "b", 1, lambda file: file.write(b"b"))
    monkeypatch.undo()

    assert entry.unfinished() == manifest
    assert entry.is_sound("a", manifest.files["a"])
    assert sorted(path.name for path in entry.directory.iterdir()) == [
        "a",
        "lock",
        "unfinished.json",
    ]


def test_the_stamp_is_size_times_and_inode(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    facts = path.stat()

    assert stamp_of(path) == (3, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)

"""The store: what is sent home comes back, from any tier, in any order, under its caps."""

from __future__ import annotations

import random
import threading
from contextlib import closing

import pytest
import torch

from flexport.errors import DiskFull, OutOfMemory
from flexport.policy import Budgets, Tier
from flexport.registry import open_backend
from flexport.store.direct_io import DirectFile
from flexport.store.store import FileRun, Kept, Store
from flexport.testing.discrete import DiscreteBackend

BUDGETS = Budgets(device_bytes=1 << 20, host_bytes=1 << 20, disk_bytes=1 << 20)


def _backend(kind):
    if kind == "cpu":
        return open_backend("cpu")[1]
    return DiscreteBackend(late="late" in kind, unified="unified" in kind)


@pytest.fixture(params=["cpu", "threads", "late", "unified", "unified, late"])
def store(request, tmp_path):
    with closing(_backend(request.param)) as backend, Store(backend, BUDGETS, tmp_path) as store:
        yield store
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("flexport")]


def _pattern(seed, num_bytes):
    values = torch.arange(num_bytes, dtype=torch.int64) * 31 + seed * 17
    return (values % 251).to(torch.uint8)


def _write(store, kept, seed):
    lease = store.draft(kept)
    lease.bytes_B.copy_(_pattern(seed, kept.num_bytes))
    store.write_back(kept, lease)


def _read(store, kept):
    lease = store.fetch(kept)
    lease.ticket.wait()
    found = lease.bytes_B.clone()
    lease.release()
    return found


@pytest.mark.parametrize("home", list(Tier))
def test_a_fetch_behind_a_write_back_of_the_same_bundle_gets_what_was_written(store, home):
    kept = store.keep("cache", 10_000, home)

    for seed in range(20):
        _write(store, kept, seed)
        lease = store.fetch(kept)
        lease.ticket.wait()
        assert torch.equal(lease.bytes_B, _pattern(seed, 10_000))
        lease.release()


@pytest.mark.parametrize("home", list(Tier))
def test_parts_of_a_bundle_are_written_and_read_by_themselves(store, home):
    """Two ranges a part, as the keys and values of some rows; whoever reads waits for all."""
    num_parts, size = 6, 4096
    kept = store.keep("cache", 2 * num_parts * size, home)
    parts = [[(part * size, size), ((num_parts + part) * size, size)] for part in range(num_parts)]

    def own(lease, ranges):
        """What a lease shows of these ranges."""
        if lease.in_place:
            return [lease.bytes_B[first : first + size] for first, _ in ranges]
        return list(lease.bytes_B.split(size))

    for part, ranges in enumerate(parts):
        lease = store.draft(kept, ranges)
        for plane, bytes_B in enumerate(own(lease, ranges)):
            bytes_B.copy_(_pattern(2 * part + plane, size))
        store.write_back(kept, lease)

    whole_B = _read(store, kept)
    for part, ranges in enumerate(parts):
        lease = store.fetch(kept, ranges)
        lease.ticket.wait()
        for plane, bytes_B in enumerate(own(lease, ranges)):
            expected_B = _pattern(2 * part + plane, size)
            assert torch.equal(bytes_B, expected_B)
            assert torch.equal(whole_B[ranges[plane][0] :][:size], expected_B)
        lease.release()


def test_many_bundles_in_any_order_keep_their_own_bytes_and_leave_nothing(store):
    draw = random.Random(3)
    before = store.device.used_bytes, store.host.used_bytes
    written: dict[Kept, int] = {}

    for step in range(300):
        if written and draw.random() < 0.3:
            kept = draw.choice(list(written))
            assert torch.equal(_read(store, kept), _pattern(written[kept], kept.num_bytes))
            if draw.random() < 0.6:
                store.drop(kept)
                del written[kept]
        elif len(written) < 12:
            kept = store.keep("cache", draw.randint(1, 20_000), draw.choice(list(Tier)))
            _write(store, kept, step)
            written[kept] = step
    for kept in written:
        store.drop(kept)
    store.drain()

    assert (store.device.used_bytes, store.host.used_bytes) == before
    assert store._spill is not None
    assert store._spill.used_bytes == 0


def test_an_open_bundle_waits_in_memory_and_is_the_same_once_it_is_settled(store):
    kept = store.keep_open("cache", 5_000, Tier.DISK)
    _write(store, kept, 1)
    assert torch.equal(_read(store, kept), _pattern(1, 5_000))
    homes = [kept.home]

    store.settle(kept)
    found = _read(store, kept)
    store.drain()

    assert [*homes, kept.home] == [Tier.HOST, Tier.DISK]
    assert torch.equal(found, _pattern(1, 5_000))
    assert store.host.used_bytes == 0
    assert store.placed_bytes["cache", Tier.DISK] == 5_000


def test_a_bundle_of_file_ranges_comes_with_each_range_where_it_says(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "weights"
    content = _pattern(5, 50_001)
    path.write_bytes(content.numpy().tobytes())
    runs = [(3, 10), (4096, 4096), (9_999, 20_000), (50_000, 1)]

    kept = store.keep_file("weights", [
        FileRun(path=path, offset_bytes=offset, num_bytes=size) for offset, size in runs
    ])  # fmt: skip
    found = _read(store, kept)

    for start, (offset, size) in zip(kept.starts_bytes, runs, strict=True):
        assert torch.equal(found[start : start + size], content[offset : offset + size])


def test_rows_of_a_table_are_read_where_they_lie(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "table"
    content = _pattern(2, 100 * 24)
    path.write_bytes(b"12345" + content.numpy().tobytes())
    rows = [7, 99, 0, 7, 50]

    run = FileRun(path=path, offset_bytes=5, num_bytes=2400)
    found = store.read_rows(run, 24, rows)

    assert torch.equal(found, content.view(100, 24)[rows])


def test_what_no_tier_has_room_for_is_refused_and_nothing_is_kept(store):
    with pytest.raises(DiskFull):
        store.keep("cache", BUDGETS.disk_bytes + 1, Tier.DISK)
    for home in (Tier.DEVICE, Tier.HOST):
        with pytest.raises(OutOfMemory):
            store.keep("cache", 4 << 20, home)

    assert store.device.used_bytes == store.host.used_bytes == 0
    assert not store.has_room(4 << 20, Tier.HOST)
    assert not store.has_room(BUDGETS.disk_bytes + 1, Tier.DISK)
    assert store.has_room(BUDGETS.disk_bytes, Tier.DISK)


def test_a_write_that_fails_is_heard_of_though_nobody_waits_for_it(store, monkeypatch):
    failed = threading.Event()

    def write(*args):
        failed.set()
        raise OSError("worn out")

    monkeypatch.setattr(DirectFile, "write_from", write)
    kept = store.keep("cache", 100, Tier.DISK)
    _write(store, kept, 0)

    failed.wait(10)
    with pytest.raises(OSError, match="worn out"):
        kept.last.join()
    with pytest.raises(OSError, match="worn out"):
        store.check()


def test_where_memory_is_unified_what_is_at_home_on_the_host_lies_in_device_memory(tmp_path):
    with (
        closing(DiscreteBackend(unified=True)) as device,
        Store(device, BUDGETS, tmp_path) as store,
    ):
        kept = store.keep("cache", 10_000, Tier.HOST)
        _write(store, kept, 1)
        found = _read(store, kept)
        moved_bytes = [device.moved_bytes("host_to_device"), device.moved_bytes("device_to_host")]

        assert torch.equal(found, _pattern(1, 10_000))
        assert moved_bytes == [0, 0]
        assert store.staging_bytes(kept) == (0, 0)


def test_where_memory_is_unified_both_kinds_of_buffers_are_under_one_cap(tmp_path):
    both_bytes = BUDGETS.device_bytes + BUDGETS.host_bytes
    half = both_bytes // 2
    with (
        closing(DiscreteBackend(unified=True)) as device,
        Store(device, BUDGETS, tmp_path) as store,
    ):
        kept = store.keep("cache", half // 2, Tier.DISK)
        _write(store, kept, 1)
        lease = store.fetch(kept)
        lease.ticket.wait()
        used_bytes = store.device.used_bytes
        with pytest.raises(OutOfMemory):
            store.keep("cache", half + 1, Tier.DEVICE)
        lease.release()
        del lease
        # Now all of it is spare, and in buffers of the wrong size, half of them in host memory.
        store.keep("cache", both_bytes, Tier.DEVICE)

        assert used_bytes == half == sum(store.staging_bytes(kept))
        assert device.peak_bytes == store.device.peak_bytes == both_bytes


def test_where_memory_is_unified_the_device_gets_work_from_no_thread_of_the_stores(tmp_path):
    """Some devices without links of their own take work from one thread at a time only."""
    callers = []

    class Watched(DiscreteBackend):
        def copy_async(self, src, dst):
            callers.append(threading.current_thread())
            return super().copy_async(src, dst)

    with closing(Watched(unified=True)) as device, Store(device, BUDGETS, tmp_path) as store:
        kept = [store.keep("cache", 10_000, Tier.DISK) for _ in range(5)]
        for seed, each in enumerate(kept):
            _write(store, each, seed)
        leases = [store.fetch(each) for each in kept]
        for lease in leases:
            lease.ticket.wait()
            lease.ticket.join()
            lease.release()

    assert callers == [threading.current_thread()] * 10


def test_disk_room_of_dropped_bundles_is_waited_for(store):
    """A bundle that is dropped with its write-back under way frees its place behind it."""
    for seed in range(30):
        kept = store.keep("cache", BUDGETS.disk_bytes // 2, Tier.DISK)
        _write(store, kept, seed)
        store.drop(kept)

"""Transfers past the page cache: right for any alignment, honest at a file's end."""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexport.errors import DiskFull, OutOfMemory, StorageError
from flexport.store import direct_io
from flexport.store.direct_io import ALIGNMENT, AlignedBuffer, DirectFile, aligned_range


def _pattern(num_bytes: int) -> bytes:
    return bytes((index * 7 + index // 251) % 256 for index in range(num_bytes))


def _aligned(data: bytes) -> torch.Tensor:
    buffer_B = AlignedBuffer(len(data)).bytes_B
    buffer_B.copy_(torch.tensor(list(data), dtype=torch.uint8))
    return buffer_B


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5000, (2 << 20) - 1, 2 << 20, (5 << 20) + 3])
def test_a_buffer_starts_on_a_page_and_has_the_size_asked_for(num_bytes: int) -> None:
    buffer = AlignedBuffer(num_bytes, touch=True)

    buffer.bytes_B.fill_(7)

    assert buffer.num_bytes == buffer.bytes_B.numel() == num_bytes
    assert num_bytes == 0 or buffer.bytes_B.data_ptr() % ALIGNMENT == 0
    assert int(buffer.bytes_B.sum(dtype=torch.int64)) == 7 * num_bytes


def test_a_view_keeps_the_memory_of_its_buffer_alive() -> None:
    view_B = AlignedBuffer(8192).bytes_B[5:105]
    view_B.fill_(3)

    others = [AlignedBuffer(8192, touch=True) for _ in range(50)]

    assert len(others) == 50
    assert view_B.tolist() == [3] * 100


def test_memory_that_is_not_there_is_told_in_our_words() -> None:
    with pytest.raises(OutOfMemory, match=r"no room for 1048576\.00 TiB more: .*--host-memory"):
        AlignedBuffer(1 << 60)


@given(offset=st.integers(0, 10**12), size=st.integers(0, 10**10))
def test_an_aligned_range_is_the_smallest_around_the_bytes(offset: int, size: int) -> None:
    start, stop = aligned_range(offset, size)

    assert start % ALIGNMENT == stop % ALIGNMENT == 0
    assert start <= offset < start + ALIGNMENT
    assert stop - ALIGNMENT < offset + size <= stop


@settings(max_examples=60, deadline=None)
@given(
    file_bytes=st.integers(1, 40_000),
    data=st.data(),
    lead=st.integers(0, 4097),
    bounce=st.sampled_from([4096, 8192, 1 << 20]),
)
def test_any_range_is_read_into_any_memory(
    tmp_path_factory: pytest.TempPathFactory,
    file_bytes: int,
    data: st.DataObject,
    lead: int,
    bounce: int,
) -> None:
    content = _pattern(file_bytes)
    path = tmp_path_factory.getbasetemp() / "any_range"
    path.write_bytes(content)
    start = data.draw(st.integers(0, file_bytes - 1))
    size = data.draw(st.integers(0, file_bytes - start))
    target_B = AlignedBuffer(lead + size + 10).bytes_B.zero_()

    with pytest.MonkeyPatch.context() as patch, DirectFile(path) as file:
        patch.setattr(direct_io, "_BOUNCE_BYTES", bounce)
        file.read_into(target_B[lead : lead + size], start)

    assert bytes(target_B.tolist()) == bytes(lead) + content[start : start + size] + bytes(10)


@settings(max_examples=60, deadline=None)
@given(size=st.integers(0, 20_000), lead=st.sampled_from([0, 1, 512, 4096]), page=st.integers(0, 3))
def test_what_is_written_is_read_back_and_the_bytes_before_stay(
    tmp_path_factory: pytest.TempPathFactory, size: int, lead: int, page: int
) -> None:
    content = _pattern(size)
    path = tmp_path_factory.getbasetemp() / "written"
    path.write_bytes(b"x" * ALIGNMENT * page)
    source_B = _aligned(bytes(lead) + content)[lead:]
    back_B = AlignedBuffer(direct_io.align_up(size)).bytes_B

    with DirectFile(path, "rw") as file:
        file.write_from(source_B, page * ALIGNMENT)
        file.read_into(back_B, page * ALIGNMENT, size)

    assert bytes(back_B[:size].tolist()) == content
    assert path.read_bytes()[: page * ALIGNMENT] == b"x" * ALIGNMENT * page


def test_tensors_of_any_dtype_and_memoryviews_are_taken(tmp_path: Path) -> None:
    source = torch.arange(3000, dtype=torch.float32).bfloat16().reshape(30, 100)
    back = torch.empty_like(source)
    raw = bytearray(6000)

    with DirectFile(tmp_path / "f", "rw") as file:
        file.write_from(source, 0)
        file.read_into(back, 0)
        file.read_into(memoryview(raw), 0)
        file.write_from(memoryview(bytes(raw)), 8192)

    assert torch.equal(back, source)
    assert (tmp_path / "f").read_bytes()[8192:14192] == bytes(raw)


def test_an_aligned_buffer_may_reach_past_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(_pattern(5000))
    buffer_B = AlignedBuffer(8192).bytes_B.zero_()

    with DirectFile(path) as file:
        file.read_into(buffer_B, 0, 5000)

    assert bytes(buffer_B.tolist()) == _pattern(5000) + bytes(3192)


@pytest.mark.parametrize("size", [5001, 8192, 20_000])
@pytest.mark.parametrize("lead", [0, 1])
def test_a_read_past_the_end_says_where_the_file_ends(tmp_path: Path, size: int, lead: int) -> None:
    path = tmp_path / "f"
    path.write_bytes(_pattern(5000))
    buffer_B = AlignedBuffer(24_576).bytes_B

    with (
        DirectFile(path) as file,
        pytest.raises(StorageError, match=rf"truncated: wanted bytes 0-{size}, .* ends at 5000"),
    ):
        file.read_into(buffer_B[lead : lead + size], 0)


def test_many_threads_share_one_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with DirectFile(path, "rw") as file:
        parts = [_aligned(bytes([index]) * 65_536) for index in range(8)]
        back = [AlignedBuffer(65_536).bytes_B for _ in parts]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(5):
                file.write_from(parts[index], index * 65_536)
                file.read_into(back[index], index * 65_536)
                if not torch.equal(back[index], parts[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"can't open .*nowhere: No such file"):
        DirectFile(tmp_path / "nowhere")


@pytest.mark.skipif(not hasattr(os, "pwritev"), reason="writes go another way here")
@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)])
def test_a_failed_write_names_file_place_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with DirectFile(tmp_path / "f", "rw") as file:
        monkeypatch.setattr(os, "pwritev", fail)
        with pytest.raises(StorageError, match=f"f at byte 4096: {os.strerror(number)}") as caught:
            file.write_from(_aligned(bytes(4096)), 4096)

    assert type(caught.value) is kind


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads go another way here")
def test_a_failed_read_names_file_place_and_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "f").write_bytes(bytes(8192))
    with DirectFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(StorageError, match=r"can't read .*f at byte 4096: Input/output error"):
            file.read_into(AlignedBuffer(4096).bytes_B, 4096)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="reads go another way here")
def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _pattern(30_000)
    (tmp_path / "f").write_bytes(content)
    buffer_B = AlignedBuffer(32_768).bytes_B
    whole = os.preadv

    def short(fd: int, views: list[memoryview], offset: int) -> int:
        return whole(fd, [view[:8192] for view in views], offset) - (1536 if offset == 0 else 0)

    with DirectFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "preadv", short)
        file.read_into(buffer_B, 0, 30_000)

    assert bytes(buffer_B[:30_000].tolist()) == content


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_a_file_system_that_refuses_direct_transfers_is_read_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    (tmp_path / "f").write_bytes(_pattern(8192))
    whole = os.preadv

    def picky(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(fd, views, offset)

    with DirectFile(tmp_path / "f") as file:
        monkeypatch.setattr(os, "preadv", picky)
        buffer_B = AlignedBuffer(8192).bytes_B
        file.read_into(buffer_B, 0)
        direct_after = file.direct

    assert bytes(buffer_B.tolist()) == _pattern(8192)
    assert not direct_after


@pytest.mark.skipif(sys.platform != "linux", reason="O_DIRECT is Linux's")
def test_an_open_that_refuses_direct_is_tried_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(_pattern(5000))
    whole = os.open

    def picky(path: Path, flags: int, mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return whole(path, flags, mode)

    monkeypatch.setattr(os, "open", picky)
    with DirectFile(tmp_path / "f", "rw") as file:
        buffer_B = torch.empty(5000, dtype=torch.uint8)
        file.read_into(buffer_B, 0)
        file.write_from(buffer_B[:100].clone(), 4096)

    assert not file.direct
    assert bytes(buffer_B.tolist()) == _pattern(5000)
    assert (tmp_path / "f").read_bytes() == _pattern(5000)[:4096] + _pattern(100) + _pattern(5000)[
        4196:
    ]


def test_without_positional_calls_seek_and_read_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    monkeypatch.delattr(os, "pwritev", raising=False)

    with DirectFile(tmp_path / "f", "rw") as file:
        file.write_from(_aligned(_pattern(10_000)), 0)
        back = bytearray(9_000)
        file.read_into(memoryview(back), 1000)

    assert bytes(back) == _pattern(10_000)[1000:]

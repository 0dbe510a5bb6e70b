from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from flexport.errors import DiskFull, StorageError, UsageError
from flexport.output.jsonl import completion_row, failure_row, to_line
from flexport.output.sink import FileSink, StreamSink
from flexport.records import Completion, Request, RowForm, SamplingParams


def answer(row_id: str | int) -> bytes:
    request = Request(request_id=str(row_id), token_ids=(1,), sampling=SamplingParams())
    done = Completion(request=request, token_ids=(2,), text="é", finish_reason="length")
    form: RowForm = "chat" if row_id == "chat" else "simple"
    return to_line(completion_row(form, row_id, done, model="m"))


REFUSAL = to_line(failure_row("simple", "dup", line=3, code="c", message="m"))
CHAT_REFUSAL = to_line(failure_row("chat", "dup", line=4, code="c", message="m"))
LINES = [answer("a"), REFUSAL, answer(7), answer("chat"), CHAT_REFUSAL]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


def test_a_torn_last_line_is_dropped_on_resume_wherever_it_was_torn(path: Path) -> None:
    whole = b"".join(LINES)
    ends = [sum(map(len, LINES[:number])) for number in range(len(LINES) + 1)]
    for num_bytes in range(len(whole) + 1):
        path.write_bytes(whole[:num_bytes])

        with FileSink.resume(path) as sink:
            num_left = sink.finished.num_answers + sink.finished.num_errors
            sink.write(LINES[0])

        num_whole = max(number for number, end in enumerate(ends) if end <= num_bytes)
        assert num_left == num_whole
        assert path.read_bytes() == b"".join(LINES[:num_whole]) + LINES[0]


def test_a_tail_of_zeros_as_a_power_cut_may_leave_is_dropped(path: Path) -> None:
    path.write_bytes(LINES[0] + b"\0" * 4096)

    with FileSink.resume(path):
        pass

    assert path.read_bytes() == LINES[0]


def test_answers_are_known_by_their_id_and_refusals_by_their_line(path: Path) -> None:
    path.write_bytes(b"".join(LINES))

    with FileSink.resume(path) as sink:
        finished = sink.finished

    assert [finished.has_answer(key) for key in ("a", "7", "chat", "dup", "b")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert [finished.has_error(line) for line in (2, 3, 4, 5)] == [False, True, True, False]
    assert (finished.num_answers, finished.num_errors) == (3, 2)


@pytest.mark.parametrize(
    "line",
    [b'{"id": "a", "prompt": "hi"}\n', b"some text\n", b"3\n", b"\n", b'{"custom_id": "a"}\n'],
)
def test_a_file_that_is_no_output_is_refused_and_left_as_it_is(path: Path, line: bytes) -> None:
    content = LINES[0] + line + b"torn"
    path.write_bytes(content)

    with pytest.raises(UsageError, match=r"line 2 of .* is not an output row"):
        FileSink.resume(path)

    assert path.read_bytes() == content


def test_an_existing_output_is_refused_unless_it_is_empty(path: Path) -> None:
    path.touch()
    with FileSink.create(path) as sink:
        sink.write(LINES[0])

    with pytest.raises(UsageError, match="--resume continues it, --overwrite starts it anew"):
        FileSink.create(path)

    assert path.read_bytes() == LINES[0]


def test_overwriting_starts_anew(path: Path) -> None:
    path.write_bytes(b"anything at all")

    with FileSink.replace(path) as sink:
        sink.write(LINES[0])

    assert path.read_bytes() == LINES[0]


def test_resuming_what_does_not_exist_starts_it(path: Path) -> None:
    with FileSink.resume(path) as sink:
        sink.write(LINES[0])

    assert path.read_bytes() == LINES[0]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(path: Path) -> None:
    with FileSink.create(path) as sink:
        sink.write(LINES[0])

        assert path.read_bytes() == LINES[0]


@pytest.mark.parametrize("second", [FileSink.create, FileSink.replace, FileSink.resume])
def test_two_runs_do_not_share_an_output(path: Path, second: object) -> None:
    assert callable(second)
    with FileSink.create(path) as sink:
        sink.write(LINES[0])

        with pytest.raises(UsageError, match="another run is writing"):
            second(path)

    assert path.read_bytes() == LINES[0]


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't write"):
        FileSink.create(tmp_path / "missing" / "out.jsonl")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on a file's size to set")
def test_a_row_that_finds_no_space_leaves_only_whole_rows(path: Path) -> None:
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    with FileSink.create(path) as sink:
        sink.write(LINES[0])
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(LINES[0]) + 10, unlimited[1]))
        try:
            with pytest.raises(DiskFull, match="--resume continues from here"):
                sink.write(LINES[1])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    assert path.read_bytes() == LINES[0]


def test_a_write_that_fails_names_the_file_and_the_reason(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(descriptor: int, data: bytes) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with FileSink.create(path) as sink:
        monkeypatch.setattr(os, "write", failing)

        with pytest.raises(StorageError, match=r"out\.jsonl: Input/output error"):
            sink.write(LINES[0])

        monkeypatch.undo()


def test_closing_twice_does_no_harm(path: Path) -> None:
    sink = FileSink.create(path)

    sink.close()
    sink.close()

    with FileSink.resume(path):  # the lock is free
        pass


def test_a_stream_gets_its_rows_at_once() -> None:
    raw = io.BytesIO()
    sink = StreamSink(io.BufferedWriter(_Unclosable(raw)))

    sink.write(LINES[0])

    assert raw.getvalue() == LINES[0]


class _Unclosable(io.RawIOBase):
    def __init__(self, inner: io.BytesIO) -> None:
        self._inner = inner

    def writable(self) -> bool:
        return True

    def write(self, data: object, /) -> int:
        return self._inner.write(bytes(data))  # type: ignore[call-overload]


def test_overwriting_keeps_the_old_rows_until_there_is_a_new_one(tmp_path: Path):
    """A run that fails before its first row must not cost the rows of the one before."""
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": "old"}\n')

    with pytest.raises(RuntimeError), FileSink.replace(path):
        raise RuntimeError("the engine could not be opened")
    kept = path.read_bytes()
    with FileSink.replace(path) as sink:
        sink.write(b'{"id": "new"}\n')
    replaced = path.read_bytes()
    with FileSink.replace(path):
        pass

    assert kept == b'{"id": "old"}\n'
    assert replaced == b'{"id": "new"}\n'
    assert path.read_bytes() == b""

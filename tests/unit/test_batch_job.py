from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.apps.batch import Generator, JobSummary, run_job
from flexport.errors import RunError
from flexport.intake.encode import Encoder
from flexport.intake.jsonl import read_rows
from flexport.output.finished import Finished, scan
from flexport.output.sink import StreamSink
from flexport.records import Completion, Request, SamplingParams
from flexport.testing.fake_engine import ByteTokenizer, FakeEngine

ENCODER = Encoder(ByteTokenizer(), SamplingParams(max_tokens=4), max_positions=64)

INPUT = [
    b'{"id": "a", "prompt": "one"}',
    b"not json",
    b'{"prompt": "three"}',
    b'{"id": "a", "prompt": "a again"}',
    b'{"id": "long", "prompt": "' + b"x" * 100 + b'"}',
    b'{"custom_id": "b", "url": "/v1/completions", "body": {"prompt": "six", "model": "own"}}',
    b'{"custom_id": "c", "url": "/v1/nothing", "body": {"prompt": "seven"}}',
    b'{"id": 8, "prompt": "eight", "max_tokens": 2}',
    b"",
    (
        b'{"custom_id": "d", "url": "/v1/chat/completions", "body": {"messages": '
        b'[{"role": "user", "content": "ten"}]}}'
    ),
]


def run(
    lines: Iterable[bytes], engine: Generator | None = None, before: bytes = b""
) -> tuple[bytes, JobSummary]:
    """What a job adds to an output, and its summary."""
    finished, whole_bytes = scan(io.BytesIO(before), Path("out.jsonl"))
    assert whole_bytes == len(before)
    written = io.BytesIO()
    summary = run_job(
        engine or FakeEngine(),
        read_rows(io.BytesIO(b"\n".join(lines))),
        StreamSink(written),
        encoder=ENCODER,
        model="m",
        finished=finished,
    )
    return written.getvalue(), summary


def comparable(output: bytes) -> list[str]:
    """Rows without what is random about them, in a fixed order."""
    rows = [json.loads(line) for line in output.splitlines()]
    for row in rows:
        if "custom_id" in row:
            del row["id"], row["response"]["request_id"]
            if row["response"]["body"]:
                del row["response"]["body"]["id"], row["response"]["body"]["created"]
    return sorted(json.dumps(row) for row in rows)


def outcome(row: dict[str, Any]) -> tuple[Any, str]:
    error = row["error"] if "custom_id" in row else row.get("error")
    return row.get("custom_id", row["id"]), error["code"] if error else "answered"


def test_every_row_has_one_line_and_a_bad_row_harms_no_other() -> None:
    output, summary = run(INPUT)

    assert sorted(map(str, (outcome(json.loads(line)) for line in output.splitlines()))) == sorted(
        map(
            str,
            [
                ("a", "answered"),
                ("2", "invalid_json"),
                ("3", "answered"),
                ("a", "duplicate_id"),
                ("long", "context_length_exceeded"),
                ("b", "answered"),
                ("c", "unsupported_url"),
                (8, "answered"),
                ("d", "answered"),
            ],
        )
    )
    assert (summary.num_answered, summary.num_failed, summary.num_skipped) == (5, 4, 0)
    assert summary.generated_tokens == 4 + 4 + 4 + 2 + 4
    assert not summary.complete


def test_an_answer_has_the_form_and_the_model_of_its_row() -> None:
    output, _ = run([INPUT[5], INPUT[9]])

    bodies = {
        row["custom_id"]: row["response"]["body"] for row in map(json.loads, output.splitlines())
    }
    assert (bodies["b"]["object"], bodies["b"]["model"]) == ("text_completion", "own")
    assert (bodies["d"]["object"], bodies["d"]["model"]) == ("chat.completion", "m")


@given(st.integers(0, 9), st.integers(1, 5))
def test_a_job_resumed_after_any_number_of_rows_has_the_rows_of_an_uninterrupted_one(
    num_kept: int, batch_size: int
) -> None:
    whole, _ = run(INPUT)
    kept = b"".join(line + b"\n" for line in run(INPUT)[0].splitlines()[:num_kept])

    added, summary = run(INPUT, FakeEngine(batch_size=batch_size), before=kept)

    assert comparable(kept + added) == comparable(whole)
    assert summary.num_skipped == num_kept
    assert summary.num_failed + summary.num_failed_before == 4


def test_a_duplicate_refused_before_its_first_use_was_answered_loses_nothing() -> None:
    lines = [b'{"id": "a", "prompt": "one"}', b'{"id": "a", "prompt": "two"}']
    whole, _ = run(lines)
    refusal = next(line + b"\n" for line in whole.splitlines() if b"duplicate_id" in line)

    added, _ = run(lines, before=refusal)

    assert comparable(refusal + added) == comparable(whole)


def test_rows_finished_before_a_run_broke_off_are_written() -> None:
    class Breaking(FakeEngine):
        def generate(
            self, requests: Iterable[Request], *, num_rows: int | None = None
        ) -> Iterator[Completion]:
            completions = super().generate(requests)
            yield next(completions)
            raise RunError("the disk is on fire")

    written = io.BytesIO()

    with pytest.raises(RunError, match="on fire"):
        run_job(
            Breaking(),
            read_rows(io.BytesIO(b"\n".join(INPUT))),
            StreamSink(written),
            encoder=ENCODER,
            model="m",
        )

    outcomes = [outcome(json.loads(line))[1] for line in written.getvalue().splitlines()]
    assert outcomes.count("answered") == 1


def test_an_engine_that_forgets_a_row_is_an_error_that_names_it() -> None:
    class Forgetful(FakeEngine):
        def generate(
            self, requests: Iterable[Request], *, num_rows: int | None = None
        ) -> Iterator[Completion]:
            return (one for one in super().generate(requests) if one.request.request_id != "3")

    with pytest.raises(RunError, match="1 rows without an answer, the first of them '3'"):
        run(INPUT, Forgetful())


def test_input_is_read_no_further_than_the_engine_asks() -> None:
    num_lines = 0

    def endless() -> Iterator[bytes]:
        nonlocal num_lines
        while True:
            num_lines += 1
            yield b'{"prompt": "a"}\n'

    class Lines(io.RawIOBase):
        lines = endless()

        def readline(self, size: int | None = -1, /) -> bytes:
            return next(self.lines)

    class TwoRows(FakeEngine):
        def generate(
            self, requests: Iterable[Request], *, num_rows: int | None = None
        ) -> Iterator[Completion]:
            source = iter(requests)
            return super().generate([next(source), next(source)])

    rows = read_rows(Lines())  # type: ignore[arg-type]

    summary = run_job(TwoRows(), rows, StreamSink(io.BytesIO()), encoder=ENCODER, model="m")

    assert (summary.num_answered, num_lines) == (2, 2)


def test_progress_hears_of_every_row() -> None:
    class Diary:
        def __init__(self) -> None:
            self.entries: list[str] = []

        def answered(self, num_tokens: int) -> None:
            self.entries.append(f"answered {num_tokens}")

        def failed(self) -> None:
            self.entries.append("failed")

        def skipped(self) -> None:
            self.entries.append("skipped")

    diary, finished = Diary(), Finished()
    finished.add({"id": "a", "finish_reason": "stop"})

    run_job(
        FakeEngine(),
        read_rows(io.BytesIO(b"\n".join([INPUT[0], INPUT[1], INPUT[2]]))),
        StreamSink(io.BytesIO()),
        encoder=ENCODER,
        model="m",
        finished=finished,
        progress=diary,
    )

    assert diary.entries == ["skipped", "failed", "answered 4"]

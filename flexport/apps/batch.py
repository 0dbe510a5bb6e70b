"""The batch job: rows in, rows out, each written the moment it is finished.

The job holds only the rows that the engine has taken and not yet answered. Whatever breaks it off
(an error, Ctrl-C, kill -9), the rows finished so far are in the sink, and a resumed job leaves
them out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from flexport.errors import RowError, RunError
from flexport.intake.encode import Encoder
from flexport.intake.rows import BadRow, Row
from flexport.output.finished import Finished
from flexport.output.jsonl import completion_row, failure_row, to_line
from flexport.output.sink import Sink
from flexport.records import Completion, Request

__all__ = ["Generator", "JobSummary", "Progress", "Quiet", "run_job"]


class Generator(Protocol):
    """What answers requests: an engine, or in tests something that looks like one."""

    def generate(
        self, requests: Iterable[Request], *, num_rows: int | None = None
    ) -> Iterator[Completion]:
        """One completion a request, in any order; takes requests only as it has room for them.

        `num_rows` is about how many there are, if that is known.
        """


class Progress(Protocol):
    """Who wants to know how the job goes."""

    def answered(self, num_tokens: int) -> None:
        """A row was answered with so many generated tokens."""

    def failed(self) -> None:
        """A row was refused."""

    def skipped(self) -> None:
        """A row was already in the output."""


class Quiet:
    """Progress that nobody wants to know about."""

    def answered(self, num_tokens: int) -> None:
        """Nothing to tell."""

    def failed(self) -> None:
        """Nothing to tell."""

    def skipped(self) -> None:
        """Nothing to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSummary:
    """What a job did. Every row of the input is in exactly one of the first three counts."""

    num_answered: int
    num_failed: int
    num_skipped: int
    num_failed_before: int
    """Of the skipped rows, those that the interrupted run had refused."""
    prompt_tokens: int
    generated_tokens: int

    @property
    def complete(self) -> bool:
        """Whether every row of the output is an answer."""
        return self.num_failed == 0 and self.num_failed_before == 0


def run_job(
    engine: Generator,
    rows: Iterable[Row | BadRow],
    sink: Sink,
    *,
    encoder: Encoder,
    model: str,
    finished: Finished | None = None,
    progress: Progress | None = None,
    num_rows: int | None = None,
) -> JobSummary:
    """Answer every row that is not `finished`, and write each answer or refusal to `sink`.

    `model` is the name in answers of OpenAI's form whose row named none; `num_rows` is about how
    many rows are not finished, if that is known.
    """
    job = _Job(sink, encoder, model, finished or Finished(), progress or Quiet())
    for completion in engine.generate(job.requests(rows), num_rows=num_rows):
        job.write_answer(completion)
    if job.taken:
        raise RunError(
            f"the engine left {len(job.taken)} rows without an answer, the first of them "
            f"{next(iter(job.taken))!r}; --resume tries them again"
        )
    return job.summary()


class _Job:
    """The rows under way, and the counts."""

    def __init__(
        self, sink: Sink, encoder: Encoder, model: str, finished: Finished, progress: Progress
    ) -> None:
        self._sink = sink
        self._encoder = encoder
        self._model = model
        self._finished = finished
        self._progress = progress
        self.taken: dict[str, Row] = {}
        """Rows that the engine has taken and not yet answered, by key."""
        self._num_answered = self._num_failed = 0
        self._num_skipped = self._num_failed_before = 0
        self._prompt_tokens = self._generated_tokens = 0

    def requests(self, rows: Iterable[Row | BadRow]) -> Iterator[Request]:
        """What is left to do. Rows that can't be run are answered here and now."""
        for row in rows:
            if self._is_finished(row):
                continue
            if isinstance(row, BadRow):
                self._write_failure(row, row.code, row.message)
                continue
            try:
                request = self._encoder.encode(row)
            except RowError as error:
                self._write_failure(row, error.code, str(error))
                continue
            self.taken[row.key] = row
            yield request

    def write_answer(self, completion: Completion) -> None:
        """Write the output row of a completion, and forget its input row."""
        row = self.taken.pop(completion.request.request_id)
        answer = completion_row(row.form, row.id, completion, model=row.model or self._model)
        self._sink.write(to_line(answer))
        self._num_answered += 1
        self._prompt_tokens += len(completion.request.token_ids)
        self._generated_tokens += len(completion.token_ids)
        self._progress.answered(len(completion.token_ids))

    def summary(self) -> JobSummary:
        """The counts."""
        return JobSummary(
            num_answered=self._num_answered,
            num_failed=self._num_failed,
            num_skipped=self._num_skipped,
            num_failed_before=self._num_failed_before,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
        )

    def _is_finished(self, row: Row | BadRow) -> bool:
        refused = self._finished.has_error(row.line)
        # The id of a bad row may be that of another row, so only its line can tell.
        answered = isinstance(row, Row) and self._finished.has_answer(row.key)
        if refused or answered:
            self._num_skipped += 1
            self._num_failed_before += refused
            self._progress.skipped()
        return refused or answered

    def _write_failure(self, row: Row | BadRow, code: str, message: str) -> None:
        failure = failure_row(row.form, row.id, line=row.line, code=code, message=message)
        self._sink.write(to_line(failure))
        self._num_failed += 1
        self._progress.failed()

"""`flexport run`: the main job, rows in and rows out; with no input, the embedded demo."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexport.apps.batch import JobSummary, run_job
from flexport.apps.demo import outcome
from flexport.cli.engine_options import add_engine_arguments, engine_settings
from flexport.cli.progress import say, show_packing, show_progress
from flexport.errors import StorageError, UsageError
from flexport.intake.encode import Encoder
from flexport.intake.jsonl import read_rows
from flexport.intake.rows import BadRow, Row
from flexport.output.finished import Finished
from flexport.output.sink import FileSink, Sink, StreamSink
from flexport.records import SamplingParams
from flexport.units import format_seconds

if TYPE_CHECKING:
    from flexport.engine.llm import LLM

__all__ = ["add_arguments", "open_llm", "run"]

_STANDARD = "-"
_INTERRUPTED = 130
_MAX_TOKENS = 128
"""More than SamplingParams' own default: an answer cut off is a row to run again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    job = parser.add_argument_group("job")
    source = job.add_mutually_exclusive_group()
    source.add_argument(
        "-i",
        "--input",
        metavar="FILE|-",
        help="rows as JSONL, in flexport's form or that of OpenAI's batch files; - is stdin "
        "(default: the embedded demo job)",
    )
    source.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="a row of its own in place of an input file; may be given several times",
    )
    job.add_argument(
        "-o",
        "--output",
        metavar="FILE|-",
        help="where output rows are appended as rows finish, in no fixed order; - is stdout "
        "(default: -; the demo shows a table)",
    )
    existing = job.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run stopped: rows that the output has, answered or "
        "refused, are not run again",
    )
    existing.add_argument(
        "--overwrite", action="store_true", help="empty the output first if it exists"
    )
    job.add_argument("--report", metavar="FILE", help="write the run's report there, as JSON")
    _add_sampling_arguments(parser)
    add_engine_arguments(parser)


def _add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    default = SamplingParams()
    sampling = parser.add_argument_group("sampling: a row's own values win over these")
    for name, kind, metavar, meaning in (
        (
            "max-tokens",
            int,
            "TOKENS",
            f"most tokens to generate (default: {_MAX_TOKENS}, or what the context has room for)",
        ),
        ("min-tokens", int, "TOKENS", "no end before so many tokens"),
        ("temperature", float, "T", "0 always takes the most likely token"),
        ("top-p", float, "P", "sample from the likeliest tokens that add up to P; 1 = all"),
        ("top-k", int, "K", "sample from the K likeliest tokens; 0 = all"),
        (
            "min-p",
            float,
            "P",
            "drop tokens below P times the likeliest one's probability; 0 = none",
        ),
        ("repetition-penalty", float, "X", "divide the score of seen tokens by X; 1 = none"),
    ):
        dest = name.replace("-", "_")
        value = getattr(default, dest)
        sampling.add_argument(
            f"--{name}",
            type=kind,
            metavar=metavar,
            default=None if dest == "max_tokens" else value,
            help=meaning if dest == "max_tokens" else f"{meaning} (default: {value})",
        )
    sampling.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        default=[],
        help="end a row before this text; may be given several times",
    )
    sampling.add_argument(
        "--ignore-eos", action="store_true", help="go on after the end-of-sequence token"
    )
    sampling.add_argument(
        "--seed",
        type=int,
        metavar="N",
        default=0,
        help="with a row's id, the seed of each row that has none of its own (default: 0)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the job; returns the exit code."""
    with ExitStack() as stack:
        job = _Job(args, stack)
        sink, finished = job.open_sink(stack)
        try:
            summary = job.run_on(sink, finished)
        except KeyboardInterrupt:
            _talk(f"interrupted; {job.how_to_resume()}")
            return _INTERRUPTED
    return 0 if summary.complete else 1


def open_llm(args: argparse.Namespace) -> LLM:
    """The engine that the options ask for; it tells its plan before it does any of it."""
    settings = engine_settings(args)

    from flexport.engine.llm import LLM  # and torch, after what can be refused without it

    return LLM(
        **settings,
        seed=args.seed,
        on_plan=lambda plan: say(plan.describe()),
        show_packing=show_packing,
    )


class _Job:
    """One command line, checked: where rows come from and where they go."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        """Opens the input, on `stack`. Raises UsageError for what can be known to be wrong."""
        from flexport import demo

        self._args = args
        self._is_demo = args.input is None and args.prompt is None
        self._input = Path(demo.INPUT_PATH if self._is_demo else args.input or _STANDARD)
        self._output = None if args.output in (None, _STANDARD) else Path(args.output)
        self._collected = io.BytesIO()
        """The demo's rows, where no output was asked for."""
        if self._is_demo and args.model is not None and Path(args.model) != demo.MODEL_DIR:
            raise UsageError(
                f"--model {args.model} has no rows to run; add --input FILE or --prompt TEXT (the "
                "demo job is for the embedded model)"
            )
        if (args.resume or args.overwrite) and self._output is None:
            raise UsageError("--resume and --overwrite need --output FILE: stdout keeps no rows")
        self._defaults = self._sampling()
        self._rows = self._open_rows(stack)

    def open_sink(self, stack: ExitStack) -> tuple[Sink, Finished]:
        """Where rows go, and which are there already."""
        if self._output is None:
            to_memory = self._is_demo and self._args.output is None
            return StreamSink(self._collected if to_memory else sys.stdout.buffer), Finished()
        if self._output.exists() and not self._output.is_file():  # /dev/null, a pipe
            return StreamSink(stack.enter_context(self._output.open("ab"))), Finished()
        how = (
            FileSink.resume
            if self._args.resume
            else FileSink.replace
            if self._args.overwrite
            else FileSink.create
        )
        sink = stack.enter_context(how(self._output))
        return sink, sink.finished

    def run_on(self, sink: Sink, finished: Finished) -> JobSummary:
        """Open the engine, run the job and tell how it went."""
        with open_llm(self._args) as llm:
            summary = self._run(llm, sink, finished)
        if self._is_demo and self._args.output != _STANDARD:
            print(outcome(self._answers()), file=sys.stderr)
        return summary

    def _run(self, llm: LLM, sink: Sink, finished: Finished) -> JobSummary:
        encoder = Encoder(
            llm.tokenizer,
            self._defaults,
            max_positions=llm.max_positions,
            vocab_size=llm.vocab_size,
            fallback_max_tokens=_MAX_TOKENS if self._args.max_tokens is None else None,
        )
        with show_progress(self._num_rows()) as progress:
            summary = run_job(
                llm.engine,
                self._rows,
                sink,
                encoder=encoder,
                model=llm.model_name,
                finished=finished,
                progress=progress,
            )
        _talk(_told(summary, llm.report))
        if self._args.report is not None:
            _write_report(Path(self._args.report), llm.report, summary)
        return summary

    def how_to_resume(self) -> str:
        """What an interrupted user does next."""
        if self._output is None:
            return "no output file was named, so there is nothing to resume; use --output FILE"
        return (
            f"finished rows are in {self._output}; the same command with --resume (and without "
            "--overwrite) runs the rest"
        )

    def _sampling(self) -> SamplingParams:
        args = self._args
        try:
            return SamplingParams(
                max_tokens=_MAX_TOKENS if args.max_tokens is None else args.max_tokens,
                min_tokens=args.min_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                min_p=args.min_p,
                repetition_penalty=args.repetition_penalty,
                stop=tuple(args.stop),
                ignore_eos=args.ignore_eos,
            )
        except ValueError as error:
            raise UsageError(f"sampling options: {error}") from error

    def _open_rows(self, stack: ExitStack) -> Iterator[Row | BadRow]:
        if self._args.prompt is not None:
            lines = b"".join(
                json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in self._args.prompt
            )
            return read_rows(io.BytesIO(lines))
        if str(self._input) == _STANDARD:
            return read_rows(sys.stdin.buffer)
        try:
            stream = stack.enter_context(self._input.open("rb"))
        except OSError as error:
            raise UsageError(
                f"can't read {self._input}: {error.strerror}; --input takes a JSONL file, or - for "
                "stdin"
            ) from error
        output = self._output
        if output is not None and output.exists() and output.samefile(self._input):
            raise UsageError(f"input and output are the same file {output}")
        return read_rows(stream)

    def _num_rows(self) -> int | None:
        """Rows to come, blank lines included; None where only the end of a pipe will tell."""
        if self._args.prompt is not None:
            return len(self._args.prompt)
        return _count_lines(self._input) if self._input.is_file() else None

    def _answers(self) -> list[bytes]:
        if self._output is None:
            return self._collected.getvalue().splitlines()
        return self._output.read_bytes().splitlines()


def _count_lines(path: Path) -> int:
    """Lines of a file, blank ones included: cheap, and near enough for a progress bar."""
    num_lines, last = 0, b"\n"
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            num_lines += chunk.count(b"\n")
            last = chunk[-1:]
    return num_lines + (last != b"\n")


def _told(summary: JobSummary, report: Mapping[str, Any]) -> str:
    """The summary as one line."""
    parts = [f"{summary.num_answered} rows answered"]
    if summary.num_failed:
        parts.append(f"{summary.num_failed} refused (see their error rows)")
    if summary.num_skipped:
        before = summary.num_failed_before
        refused = f", {before} of them refused" if before else ""
        parts.append(f"{summary.num_skipped} were in the output already{refused}")
    if summary.num_answered:
        seconds, rate = report["seconds"]["total"], report["throughput"]["generation_tok_s"]
        parts.append(
            f"{summary.generated_tokens} tokens generated in {format_seconds(seconds)}, "
            f"{rate:.1f} tok/s in prefill and decode"
        )
    return "; ".join(parts)


def _write_report(path: Path, report: Mapping[str, Any], summary: JobSummary) -> None:
    """The engine's report, and the counts of the job."""
    text = json.dumps({**report, "job": asdict(summary)}, indent=2)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"can't write the report {path}: {error.strerror}") from error


def _talk(line: str) -> None:
    print(f"flexport: {line}", file=sys.stderr)

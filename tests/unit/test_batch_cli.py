"""`flexport run` with everything but the model: options, files, exit codes, what is said."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from flexport.cli import main as cli
from flexport.cli import run as command
from flexport.records import Completion, Request
from flexport.testing.fake_engine import ByteTokenizer, FakeEngine


class FakeLLM:
    """As much of an engine with a model as `flexport run` asks for."""

    max_positions = 64
    model_name = "fake-model"
    plan = None

    def __init__(self, engine: FakeEngine | None = None) -> None:
        self.tokenizer = ByteTokenizer()
        self.vocab_size = self.tokenizer.vocab_size
        self.engine = engine or FakeEngine()
        self.report: dict[str, Any] = {
            "seconds": {"total": 2.0},
            "throughput": {"generation_tok_s": 7.5},
        }

    def __enter__(self) -> FakeLLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass


@pytest.fixture(autouse=True)
def fake_llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    llm = FakeLLM()

    def open_llm(args: argparse.Namespace) -> FakeLLM:
        return llm

    monkeypatch.setattr(command, "open_llm", open_llm)
    return llm


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": "a", "prompt": "one"}\n{"id": "b", "prompt": "two", "max_tokens": 3}\n')
    return path


def flexport_run(*arguments: object) -> int:
    return cli.main(["run", *map(str, arguments)])


def rows_of(text: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, text.splitlines())}


def test_a_file_goes_in_and_a_file_comes_out(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    code = flexport_run("-i", source, "-o", output, "--max-tokens", 5)

    assert code == 0
    rows = rows_of(output.read_text())
    assert [rows[name]["completion_tokens"] for name in "ab"] == [5, 3]


def test_stdout_holds_rows_and_nothing_else(
    source: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    code = flexport_run("-i", source)

    said = capsysbinary.readouterr()
    assert code == 0
    assert sorted(rows_of(said.out.decode())) == ["a", "b"]
    assert b"2 rows answered; 64 tokens generated in 2.0 s, 7.5 tok/s" in said.err


def test_what_was_predicted_and_what_went_wrong_is_said_at_the_end(
    source: Path, fake_llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {
        "generation_tok_s": 7.5,
        "seconds": {"load": 0.5, "prefill": 1.0, "decode": 3.0},
        "busy_seconds": {"compute": 1.0},
        "wait_seconds": {"compute": 3.0},
    }
    fake_llm.report |= {
        "comparison": {"predicted": figures, "measured": figures},
        "warnings": ["computing waited"],
    }

    flexport_run("-i", source)

    err = capsys.readouterr().err
    assert "waiting for copies" in err
    assert "3.0 s  75 %" in err
    assert "flexport: computing waited\n" in err


def test_the_engine_is_told_how_many_rows_are_left(
    source: Path, tmp_path: Path, fake_llm: FakeLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, told = tmp_path / "out.jsonl", []

    def generate(
        requests: Iterable[Request], *, num_rows: int | None = None
    ) -> Iterator[Completion]:
        told.append(num_rows)
        return FakeEngine().generate(requests)

    monkeypatch.setattr(fake_llm.engine, "generate", generate)
    flexport_run("-i", source, "-o", output)
    source.write_text(source.read_text() + '{"id": "c", "prompt": "three"}')
    flexport_run("-i", source, "-o", output, "--resume")

    assert told == [2, 1]


def test_prompts_on_the_command_line_are_rows(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    code = flexport_run("--prompt", "one", "--prompt", "zwö", "--max-tokens", 2)

    rows = rows_of(capsysbinary.readouterr().out.decode())
    assert code == 0
    assert [rows[name]["prompt_tokens"] for name in "12"] == [3, 4]


def test_some_failed_rows_make_exit_code_1_and_the_others_are_there(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    source.write_text(source.read_text() + "not json\n")

    first = flexport_run("-i", source, "-o", output, "--max-tokens", 5)
    again = flexport_run("-i", source, "-o", output, "--max-tokens", 5, "--resume")

    assert (first, again) == (1, 1)
    assert sorted(rows_of(output.read_text())) == ["3", "a", "b"]
    assert "1 refused (see their error rows)" in capsys.readouterr().err


def test_an_existing_output_is_refused_unless_told_what_to_do_with_it(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    flexport_run("-i", source, "-o", output)
    before = output.read_text()

    refused = flexport_run("-i", source, "-o", output)
    resumed = flexport_run("-i", source, "-o", output, "--resume")
    after_resume = output.read_text()
    overwritten = flexport_run("-i", source, "-o", output, "--overwrite", "--max-tokens", 1)

    assert (refused, resumed, overwritten) == (2, 0, 0)
    assert before == after_resume
    assert rows_of(output.read_text())["a"]["completion_tokens"] == 1
    assert "--resume continues it, --overwrite starts it anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["-i", "missing.jsonl"], "can't read missing.jsonl: No such file"),
        (["-i", "."], "can't read .:"),
        (["-i", "IN", "-o", "IN", "--overwrite"], "the same file"),
        (["-i", "IN", "--resume"], "need --output FILE"),
        (["-i", "IN", "--overwrite", "-o", "-"], "need --output FILE"),
        (["-i", "IN", "--resume", "--overwrite", "-o", "x"], "not allowed with"),
        (["-i", "IN", "--prompt", "x"], "not allowed with"),
        (["-i", "IN", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["-i", "IN", "--top-p", "2"], "top_p must be in"),
        (["-i", "IN", "--stop", ""], "stop string must not be empty"),
        (["--model", "facebook/opt-125m"], "add --input FILE or --prompt TEXT"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_opened(
    arguments: list[str],
    told: str,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(args: argparse.Namespace) -> FakeLLM:
        raise AssertionError("the engine was opened")

    monkeypatch.setattr(command, "open_llm", never)
    content = source.read_text()

    code = flexport_run(*(str(source) if part == "IN" else part for part in arguments))

    assert code == 2
    assert told in capsys.readouterr().err
    assert source.read_text() == content


def test_an_interrupted_run_exits_with_130_and_says_how_to_go_on(
    source: Path, tmp_path: Path, fake_llm: FakeLLM, capsys: pytest.CaptureFixture[str]
) -> None:
    class Interrupted(FakeEngine):
        def generate(
            self, requests: Iterable[Request], *, num_rows: int | None = None
        ) -> Iterator[Completion]:
            yield next(super().generate(requests))
            raise KeyboardInterrupt

    output = tmp_path / "out.jsonl"
    fake_llm.engine = Interrupted()

    code = flexport_run("-i", source, "-o", output)
    fake_llm.engine = FakeEngine()
    resumed = flexport_run("-i", source, "-o", output, "--resume")

    assert (code, resumed) == (130, 0)
    assert "the same command with --resume" in capsys.readouterr().err
    assert len(output.read_text().splitlines()) == 2


def test_the_report_has_the_jobs_counts_beside_the_engines_figures(
    source: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"

    flexport_run("-i", source, "-o", tmp_path / "out.jsonl", "--report", report)

    told = json.loads(report.read_text())
    assert told["throughput"] == {"generation_tok_s": 7.5}
    assert (told["job"]["num_answered"], told["job"]["num_failed"]) == (2, 0)


def test_sampling_options_reach_the_rows(source: Path, fake_llm: FakeLLM, tmp_path: Path) -> None:
    seen: list[Request] = []

    class Listening(FakeEngine):
        def generate(
            self, requests: Iterable[Request], *, num_rows: int | None = None
        ) -> Iterator[Completion]:
            return super().generate(self._heard(requests))

        def _heard(self, requests: Iterable[Request]) -> Iterator[Request]:
            for request in requests:
                seen.append(request)
                yield request

    fake_llm.engine = Listening()

    flexport_run(
        *("-i", source, "-o", tmp_path / "out.jsonl", "--max-tokens", 9, "--min-tokens", 2),
        *("--temperature", 0.5, "--top-p", 0.9, "--top-k", 7, "--min-p", 0.1),
        *("--repetition-penalty", 1.2, "--stop", "x", "--stop", "y", "--ignore-eos"),
    )

    sampling = seen[0].sampling
    assert (sampling.max_tokens, sampling.min_tokens) == (9, 2)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.2)
    assert (sampling.stop, sampling.ignore_eos) == (("x", "y"), True)
    assert seen[1].sampling.max_tokens == 3

"""Jobs that predictions and plans are judged by: rows of made-up tokens, on known shapes."""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexport import process
from flexport.bench.checkpoint import shared_checkpoint
from flexport.bench.workload import FIRST_ORDINARY_TOKEN
from flexport.planner.footprint import JobSizes
from flexport.records import SamplingParams
from flexport.registry import open_backend

if TYPE_CHECKING:
    from flexport.engine.plan import Plan

__all__ = ["Case", "arguments", "is_asked_for", "ran", "row", "write"]

WARM_ROWS = 16
"""Of the short run that comes before any that counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job under a policy."""

    name: str
    model: str
    dtype: str = "bfloat16"
    """Of the weights, and computed in."""
    rows: int
    prompt: tuple[int, int]
    """Shortest and longest prompt, in tokens."""
    new: int
    """Tokens that each row is continued by."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `flexport.LLM`."""

    def checkpoint(self, directory: Path) -> Path:
        """The model, made below `directory` if it is not there."""
        return shared_checkpoint(self.model, self.dtype, directory)

    @property
    def lengths(self) -> list[int]:
        """Of each row's prompt."""
        draw = random.Random(0)
        return [draw.randint(*self.prompt) for _ in range(self.rows)]

    @property
    def job(self) -> JobSizes:
        """What a plan is made for."""
        return JobSizes(
            prompt_tokens=max(self.lengths),
            new_tokens=self.new,
            num_rows=self.rows,
            mean_prompt_tokens=statistics.fmean(self.lengths),
        )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each row."""
        draw = random.Random(0)
        return [
            [draw.randrange(FIRST_ORDINARY_TOKEN, vocab_size) for _ in range(length)]
            for length in self.lengths
        ]


def ran(
    case: Case, backend: str, directory: Path, repeats: int = 1
) -> tuple[Plan, list[dict[str, Any]]]:
    """The case's plan, and the reports of `repeats` runs after a short one, which loads.

    Models are made in `directory`, and tensors spilled there.
    """
    from flexport import LLM

    model = case.checkpoint(directory / "models")
    options = {"backend": backend, "dtype": case.dtype, "offload_dir": directory, **case.settings}
    with LLM(model, **options) as llm:
        prompts = case.prompts(llm.vocab_size)
        llm.generate(prompts[:WARM_ROWS], SamplingParams(max_tokens=2))
        reports = []
        for _ in range(repeats):
            llm.generate(prompts, SamplingParams(max_tokens=case.new, ignore_eos=True))
            reports.append(llm.report)
        assert llm.plan is not None
        return llm.plan, reports


# ---- as commands


def arguments(description: str, argv: Sequence[str] | None) -> argparse.Namespace:
    """What a command is asked for; `backend` is a name, `unified` says if its memory is the host's."""
    process.prepare()
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--backend", default="auto", help="which device (default: the best)")
    parser.add_argument("--repeats", type=int, default=3, help="runs that count (default: 3)")
    parser.add_argument("--only", action="append", help="cases that have this text; repeatable")
    parser.add_argument("--json", action="store_true", help="JSON lines in place of a table")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "flexport-bench",
        help="where models are made and tensors spilled (default: in the temporary directory)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.dir.mkdir(parents=True, exist_ok=True)
    args.backend, backend = open_backend(args.backend)
    args.unified = backend.capabilities.unified
    backend.close()
    return args


def is_asked_for(args: argparse.Namespace, case: Case) -> bool:
    """Whether its name has one of the texts of --only."""
    return any(word in case.name for word in args.only or [""])


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def write(line: str) -> None:
    """Print it at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()

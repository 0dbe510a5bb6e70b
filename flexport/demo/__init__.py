"""The embedded demo: a small trained model and its job, so that a first run needs no download.

The job reads unseen order, delivery and booking notes and answers each with its fields on one line.
This module only knows where the files are and how to mark the answers; `data` makes the records and
`train` the model (see README.md here).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["INPUT_PATH", "MODEL_DIR", "Accuracy", "accuracy", "expected"]

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "model"
"""A Hugging Face directory: an OPT of 4 layers with its own tokenizer."""

INPUT_PATH = _HERE / "input.jsonl"
"""The demo job: rows of id, prompt and max_tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How many of the job's rows were answered exactly."""

    num_rows: int
    num_exact: int

    @property
    def share(self) -> float:
        """Exact rows as a share of all rows; 0 where there are none."""
        return self.num_exact / self.num_rows if self.num_rows else 0.0


def expected() -> dict[str, str]:
    """The right answer of every row of the demo job, by id."""
    with (_HERE / "expected.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {row["id"]: row["text"] for row in rows}


def accuracy(
    rows: Iterable[Mapping[str, Any]], answers: Mapping[str, str] | None = None
) -> Accuracy:
    """Exact matches among output rows, by id; white space around a text is forgiven.

    Rows are flexport output rows; an error row, or one whose id has no answer, counts as wrong.
    The answers are the demo job's unless others are given.
    """
    right = expected() if answers is None else answers
    num_rows = num_exact = 0
    for row in rows:
        num_rows += 1
        answer = right.get(row["id"])
        num_exact += answer is not None and row.get("text", "").strip() == answer
    return Accuracy(num_rows=num_rows, num_exact=num_exact)

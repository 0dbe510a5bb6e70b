"""The embedded demo job: its records as text, its run, and its outcome as a newcomer reads it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexport import demo
from flexport.apps.batch import Generator, Progress, run_job
from flexport.demo.data import PROMPT_END
from flexport.intake.encode import Encoder
from flexport.intake.jsonl import read_rows
from flexport.output.sink import StreamSink
from flexport.records import SamplingParams
from flexport.tokenizer import Tokenizer

__all__ = ["documents", "mark", "outcome"]

NUM_EXAMPLES = 5
PROMPT_WIDTH = 60
"""With the answer beside it, a line of the table still fits a wide terminal."""


def documents(tokenizer: Tokenizer) -> list[list[int]]:
    """Each record with its right answer and the end of text: what the model was trained on."""
    answers = demo.expected()
    return [
        [
            *tokenizer.encode_continuation(prompt),
            *tokenizer.encode_continuation(answers[key]),
            *tokenizer.eos_token_ids,
        ]
        for key, prompt in _prompts().items()
    ]


def mark(engine: Generator, tokenizer: Tokenizer | None, progress: Progress) -> demo.Accuracy:
    """Run the job, and see how many of its rows are answered exactly."""
    answers = io.BytesIO()
    encoder = Encoder(tokenizer, SamplingParams())
    with demo.INPUT_PATH.open("rb") as file:
        run_job(
            engine,
            read_rows(file),
            StreamSink(answers),
            encoder=encoder,
            model=str(demo.MODEL_DIR),
            progress=progress,
        )
    return demo.accuracy(map(json.loads, answers.getvalue().splitlines()))


def outcome(lines: Iterable[bytes]) -> str:
    """A few of the demo's output rows beside their prompts, and how many are right."""
    rows = [json.loads(line) for line in lines]
    marks = demo.accuracy(rows)
    return (
        f"{_table(rows[:NUM_EXAMPLES], _prompts(), demo.expected())}\n\n"
        f"demo: {marks.num_exact} of {marks.num_rows} unseen records read exactly right "
        f"({marks.share:.1%})"
    )


def _prompts() -> dict[str, str]:
    """The job's prompts, by id."""
    with demo.INPUT_PATH.open("rb") as file:
        return {row["id"]: row["prompt"] for row in map(json.loads, file)}


def _table(
    rows: Sequence[Mapping[str, Any]], prompts: Mapping[str, str], right: Mapping[str, str]
) -> str:
    lines = [f"{'RECORD':{PROMPT_WIDTH}}  RIGHT  ANSWER"]
    for row in rows:
        text = row.get("text", "").strip()
        mark = "yes" if text == right.get(row["id"]) else "no"
        lines.append(f"{_tail(prompts[row['id']]):{PROMPT_WIDTH}}  {mark:5}  {text}")
    return "\n".join(lines)


def _tail(prompt: str) -> str:
    """The end of a record on one line."""
    flat = " ".join(prompt.removesuffix(PROMPT_END).split())
    return flat if len(flat) <= PROMPT_WIDTH else f"…{flat[1 - PROMPT_WIDTH :]}"

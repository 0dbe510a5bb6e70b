"""The embedded demo job's outcome, as a newcomer reads it: a few examples, and the accuracy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexport import demo
from flexport.demo.data import PROMPT_END

__all__ = ["outcome"]

NUM_EXAMPLES = 5
PROMPT_WIDTH = 60
"""With the answer beside it, a line of the table still fits a wide terminal."""


def outcome(lines: Iterable[bytes]) -> str:
    """A few of the demo's output rows beside their prompts, and how many are right."""
    rows = [json.loads(line) for line in lines]
    with demo.INPUT_PATH.open("rb") as file:
        prompts = {row["id"]: row["prompt"] for row in map(json.loads, file)}
    marks = demo.accuracy(rows)
    return (
        f"{_table(rows[:NUM_EXAMPLES], prompts, demo.expected())}\n\n"
        f"demo: {marks.num_exact} of {marks.num_rows} unseen records read exactly right "
        f"({marks.share:.1%})"
    )


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

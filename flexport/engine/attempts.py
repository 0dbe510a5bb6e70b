"""One job in several attempts: what is kept of one that ran out of memory, and what is let go of."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from flexport.policy import Policy

__all__ = ["forget", "joined", "retry", "throughput"]

ADDED_UP = (
    "moved_bytes",
    "sparse_attention",
    "seconds",
    "busy_seconds",
    "wait_seconds",
    "tokens",
)
"""What several attempts did together."""

BLOCK = ("batch_size", "num_batches", "prefill_tokens", "sweep_tokens")


def forget(error: BaseException) -> None:
    """Let go of all that was alive where an error was raised, whoever still holds the error.

    A traceback keeps the frames, and those the tensors, of a visit that is not gone on with:
    memory that the next attempt needs.
    """
    told: BaseException | None = error
    while told is not None:
        traceback.clear_frames(told.__traceback__)
        told.__traceback__ = None
        told = told.__cause__ or told.__context__


def retry(reason: str, before: Policy, after: Policy, num_rows: int) -> dict[str, Any]:
    """What a report tells of a block that was halved; `num_rows` were begun again."""
    return {
        "reason": reason,
        "rows_restarted": num_rows,
        "before": {name: getattr(before, name) for name in BLOCK},
        "after": {name: getattr(after, name) for name in BLOCK},
    }


def joined(
    attempts: Sequence[Mapping[str, Any]], retries: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The report of a job that took one attempt or several: the last one's plan, the work of all."""
    found = dict(attempts[-1])
    for field in ADDED_UP:
        found[field] = {name: sum(each[field][name] for each in attempts) for name in found[field]}
    found["rows"] = sum(each["rows"] for each in attempts)
    found["peak_bytes"] = {
        tier: max(each["peak_bytes"][tier] for each in attempts) for tier in found["peak_bytes"]
    }
    found["throughput"] = throughput(found["tokens"], found["seconds"])
    found["retries"] = list(retries)
    return found


def throughput(tokens: Mapping[str, int], seconds: Mapping[str, float]) -> dict[str, float]:
    """Tokens a second of prefill and decode."""
    busy_s = seconds["prefill"] + seconds["decode"]
    generated, prompt = tokens["generated"], tokens["prompt"]
    return {
        "generation_tok_s": generated / busy_s if busy_s else 0.0,
        "total_tok_s": (prompt + generated) / busy_s if busy_s else 0.0,
    }

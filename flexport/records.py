"""Nouns that more than one room uses: what a row asks for, and what it got.

A `Request` is one row after tokenisation; a `Completion` is what the engine made of it.
`RequestOutput` and `CompletionOutput` are the same in the shape that users of vLLM know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

__all__ = [
    "Completion",
    "CompletionOutput",
    "FileTensor",
    "FinishReason",
    "Request",
    "RequestOutput",
    "RowForm",
    "SamplingParams",
]

FinishReason = Literal["stop", "length"]

RowForm = Literal["simple", "completions", "chat"]
"""How a row came and wants its answer: flexport's own form, or one of OpenAI's batch endpoints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token of a row is chosen, and when the row ends.

    temperature 0 is greedy: the most likely token after the repetition penalty.
    top_k 0, top_p 1 and min_p 0 switch the respective cut off. With no seed of its own a row
    derives one from the run's seed and its id, so that its sample does not depend on its
    neighbours.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        checks = (
            (self.max_tokens >= 1, "max_tokens must be at least 1", self.max_tokens),
            (0 <= self.min_tokens <= self.max_tokens,
             "min_tokens must be between 0 and max_tokens", self.min_tokens),
            (self.temperature >= 0 and math.isfinite(self.temperature),
             "temperature must be finite and >= 0", self.temperature),
            (0 < self.top_p <= 1, "top_p must be in (0, 1]", self.top_p),
            (self.top_k >= 0, "top_k must be >= 0 (0 = off)", self.top_k),
            (0 <= self.min_p <= 1, "min_p must be in [0, 1]", self.min_p),
            (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty),
             "repetition_penalty must be finite and > 0", self.repetition_penalty),
            (all(self.stop), "a stop string must not be empty", self.stop),
        )  # fmt: skip
        for holds, law, found in checks:
            if not holds:
                raise ValueError(f"{law}, got {found!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileTensor:
    """A tensor as it lies in a file: one contiguous, little-endian, row-major byte range."""

    name: str
    path: Path
    offset_bytes: int
    num_bytes: int
    dtype: str
    """By torch's name, e.g. "bfloat16"."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row, ready to run: its prompt as token ids and how to continue it."""

    request_id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    prompt: str | None = None

    def __post_init__(self) -> None:
        assert self.token_ids, f"request {self.request_id!r} has no tokens"

    @property
    def num_tokens(self) -> int:
        """Prompt tokens plus the most that may be generated."""
        return len(self.token_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the engine made of a request. `text` ends before the stop string, if one was met."""

    request: Request
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One continuation of a prompt (named as in vLLM)."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A prompt and its continuations (named as in vLLM)."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)

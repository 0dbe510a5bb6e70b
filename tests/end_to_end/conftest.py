"""Tiny random models with what transformers makes of them, computed once a session.

The references are float32. Greedy ones ignore the end of text, so that any shorter continuation
is a prefix of them, and a test says itself where a row ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

import flexport
from flexport import SamplingParams
from flexport.testing.checkpoints import tiny_opt

NUM_PROMPTS = 10
MOST_NEW_TOKENS = 14
PROMPT_LENGTHS = (1, 1, 2, 7, 7, 7, 13, 24, 33, 41)

SMALLEST_MARGIN = 1e-3
"""Between the two best logits of every reference token: a hundred times float32's disorder."""


@dataclass(frozen=True)
class Reference:
    """A checkpoint and how transformers continues some prompts of it."""

    directory: Path
    model: Any
    prompts: list[list[int]] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)

    def continued(self, index: int, num_tokens: int) -> list[int]:
        """What follows a prompt, as far as num_tokens."""
        return self.greedy[index][:num_tokens]


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Reference]:
    """reference(variant, dtype): made when first asked for."""
    made: dict[tuple[str, str], Reference] = {}

    def get(variant: str = "125m-like", dtype: str = "float32") -> Reference:
        if (variant, dtype) not in made:
            directory = tmp_path_factory.mktemp(f"{variant}-{dtype}")
            made[variant, dtype] = _reference(directory, variant, dtype)
        return made[variant, dtype]

    return get


def _reference(directory: Path, variant: str, dtype: str) -> Reference:
    tiny_opt(directory, variant=variant, dtype=dtype, shards=2, tokenizer=True)
    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    draw = random.Random(7)
    found = Reference(directory, model)
    for length in PROMPT_LENGTHS:
        continuation = None
        while continuation is None:
            prompt = [draw.randrange(4, 260) for _ in range(length)]
            continuation = _continue(model, prompt)
        found.prompts.append(prompt)
        found.greedy.append(continuation)
    return found


def _continue(model: Any, prompt: Sequence[int]) -> list[int] | None:
    """The greedy continuation; None if a near tie makes it a matter of rounding."""
    ids = list(prompt)
    for _ in range(MOST_NEW_TOKENS):
        with torch.no_grad():
            logits_V = model(torch.tensor([ids])).logits[0, -1]
        best, second = logits_V.topk(2).values.tolist()
        if best - second < SMALLEST_MARGIN:
            return None
        ids.append(int(logits_V.argmax()))
    return ids[len(prompt) :]


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    """Greedy sampling that goes on after the end of text."""
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, **fields)


@pytest.fixture(scope="session")
def continue_greedily() -> Callable[[flexport.LLM, Sequence[Sequence[int]], Sequence[int]], Any]:
    """continue_greedily(llm, prompts, lengths): the token ids of each continuation."""

    def run(
        llm: flexport.LLM, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> list[list[int]]:
        outputs = llm.generate(prompts, [greedy(length) for length in lengths])
        return [output.outputs[0].token_ids for output in outputs]

    return run

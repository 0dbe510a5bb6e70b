"""Tiny random models with what transformers makes of them, computed once a session.

The references are float32. Greedy ones ignore the end of text, so that any shorter continuation
is a prefix of them, and a test says itself where a row ends.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import OPTForCausalLM

import flexport
from flexport import SamplingParams
from flexport.engine.plan import Plan
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
        prompt, continuation = _draw(model, draw, length)
        found.prompts.append(prompt)
        found.greedy.append(continuation)
    return found


def _draw(model: Any, draw: random.Random, length: int) -> tuple[list[int], list[int]]:
    """A prompt, and its continuation."""
    while True:
        prompt = [draw.randrange(4, 260) for _ in range(length)]
        continuation = _continue(model, prompt)
        if continuation is not None:
            return prompt, continuation


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


def _continue_greedily(
    llm: flexport.LLM, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[list[int]]:
    outputs = llm.generate(prompts, [greedy(length) for length in lengths])
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="session")
def continue_greedily() -> Callable[..., list[list[int]]]:
    """continue_greedily(llm, prompts, lengths): the token ids of each continuation."""
    return _continue_greedily


class _PlanKnown(Exception):
    """The plan is all that was wanted."""


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., Plan]:
    """plan_for(prompts, lengths, **options): what an LLM of these options would do, undone."""

    def get(prompts: Sequence[Sequence[int]], lengths: Sequence[int], **options: Any) -> Plan:
        plans: list[Plan] = []

        def stop(plan: Plan) -> None:
            plans.append(plan)
            raise _PlanKnown

        with flexport.LLM(**options, on_plan=stop) as llm, pytest.raises(_PlanKnown):
            _continue_greedily(llm, prompts, lengths)
        return plans[0]

    return get


@pytest.fixture(scope="session")
def pool_bytes() -> Callable[[flexport.LLM], tuple[int, ...]]:
    """pool_bytes(llm): what is in use now on device, host and disk."""

    def get(llm: flexport.LLM) -> tuple[int, ...]:
        assert llm.engine._loaded is not None
        store = llm.engine._loaded.store
        spilled_bytes = store._spill.used_bytes if store._spill else 0
        return store.device.used_bytes, store.host.used_bytes, spilled_bytes

    return get


@pytest.fixture
def nothing_left(tmp_path: Path) -> Iterator[Path]:
    """An offload directory that must be empty in the end, when no thread may be left either."""
    directory = tmp_path / "offload"
    directory.mkdir()

    yield directory

    assert list(directory.iterdir()) == []
    assert [t.name for t in threading.enumerate() if t.name.startswith("flexport")] == []

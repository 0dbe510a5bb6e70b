"""Whole runs of tiny models, with their tensors in many mixes of places, and what they should say.

Each variant runs in two of the mixes below, so that a family with several variants meets them all;
FLEXPORT_TEST_ALL_MIXES=1 runs every variant in every mix.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flexport
from flexport import Policy, SamplingParams
from flexport.testing.discrete import DiscreteBackend
from flexport.testing.families.tiny import Variant, make

__all__ = ["Reference", "cases", "continuations", "reference_of"]

PROMPT_LENGTHS = (1, 7, 7, 13, 24, 41)
NEW_TOKENS = (14, 3, 9, 14, 1, 12)
"""Rows are ragged and end at different steps."""

SMALLEST_MARGIN = 1e-3
"""Between the two best logits of every reference token: a hundred times float32's disorder."""

MEMORY: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "1GiB"}

MIXES: dict[str, dict[str, Any]] = {
    # whether the device has memory of its own, the six shares, and the rest of the policy
    "in memory": {"own": False, "percent": [100, 0, 100, 0, 100, 0], "batch_size": 6},
    "all on disk": {
        "own": False,
        "percent": [0, 0, 0, 0, 0, 0],
        "batch_size": 2,
        "num_batches": 2,
        "prefill_tokens": 8,
    },
    "device and disk, paced": {
        "own": False,
        "percent": [35, 0, 50, 0, 60, 0],
        "batch_size": 2,
        "num_batches": 3,
        "prefill_tokens": 16,
        "sweep_tokens": 20,
    },
    "all three tiers": {
        "own": True,
        "percent": [40, 30, 30, 40, 40, 30],
        "batch_size": 3,
        "num_batches": 2,
    },
    "a CPU beside the device": {
        "own": True,
        "percent": [40, 60, 20, 50, 100, 0],
        "batch_size": 3,
        "num_batches": 2,
        "prefill_tokens": 16,
        "cpu_attention": True,
        "cpu_projections": True,
    },
}


@dataclass(frozen=True)
class Reference:
    """A tiny model's directory, and how transformers continues some prompts of it."""

    directory: Path
    prompts: list[list[int]]
    continuations: list[list[int]]


def cases(variants: Sequence[Variant]) -> Iterator[Any]:
    """Each variant with its mixes, as pytest's parameters."""
    names = list(MIXES)
    for number, variant in enumerate(variants):
        own = [names[(2 * number + step) % len(names)] for step in range(2)]
        for mix in names if os.environ.get("FLEXPORT_TEST_ALL_MIXES") else own:
            yield pytest.param(variant, MIXES[mix], id=f"{variant}, {mix}")


_made: dict[str, Reference] = {}


def reference_of(variant: Variant, folders: pytest.TempPathFactory) -> Reference:
    """What transformers says, which is kept until another variant's is asked for."""
    key = str(variant)
    if key not in _made:
        _made.clear()
        _made[key] = _reference(variant, folders.mktemp("family"))
    return _made[key]


def continuations(reference: Reference, mix: dict[str, Any], offload_dir: Path) -> list[list[int]]:
    """How the engine continues the prompts, with the tensors where the mix has them."""
    return run(reference, mix, offload_dir)[0]


def run(
    reference: Reference, mix: dict[str, Any], offload_dir: Path
) -> tuple[list[list[int]], dict[str, Any]]:
    """The same, and the run's report."""
    mix = dict(mix)
    own, percent = mix.pop("own"), mix.pop("percent")
    weights, cache, activations = Policy.splits_from_percent(percent)
    policy = Policy(weights=weights, cache=cache, activations=activations, **mix)
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in NEW_TOKENS]
    with contextlib.ExitStack() as stack:
        backend: Any = "cpu"
        if own:
            backend = stack.enter_context(contextlib.closing(DiscreteBackend(memory_bytes=1 << 30)))
        llm = stack.enter_context(
            flexport.LLM(
                reference.directory,
                backend=backend,
                dtype="float32",
                policy=policy,
                offload_dir=offload_dir,
                **MEMORY,
            )
        )
        outputs = llm.generate(reference.prompts, params)
        return [list(output.outputs[0].token_ids) for output in outputs], llm.report


def _reference(variant: Variant, directory: Path) -> Reference:
    return reference_from(make(variant, directory), directory)


def reference_from(model: Any, directory: Path) -> Reference:
    """Some prompts, and how transformers' model, which lies in the directory, continues them."""
    draw, prompts, continuations = random.Random(7), [], []
    for length, num_new in zip(PROMPT_LENGTHS, NEW_TOKENS, strict=True):
        while True:
            prompt = [
                draw.randrange(3, model.config.get_text_config().vocab_size) for _ in range(length)
            ]
            ids = _continued(model, prompt, num_new)
            if ids is not None:
                break
        prompts.append(prompt)
        continuations.append(ids)
    return Reference(directory, prompts, continuations)


@torch.no_grad()
def _continued(model: Any, prompt: list[int], num_new: int) -> list[int] | None:
    """The greedy continuation, step by step; None if a near tie makes it a matter of rounding."""
    ids: list[int] = []
    out = model(torch.tensor([prompt]), use_cache=True)
    while True:
        best, second = out.logits[0, -1].topk(2).values.tolist()
        if best - second < SMALLEST_MARGIN:
            return None
        ids.append(int(out.logits[0, -1].argmax()))
        if len(ids) == num_new:
            return ids
        out = model(torch.tensor([ids[-1:]]), past_key_values=out.past_key_values, use_cache=True)

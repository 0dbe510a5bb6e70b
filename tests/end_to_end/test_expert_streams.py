"""An expert moves once a layer and sweep however many rows picked it, and not at all if none did."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import flexport
from flexport import SamplingParams
from flexport.engine.source import open_source
from flexport.models.tensors import owned_tensors
from flexport.testing.families import Variant
from flexport.testing.families.tiny import make

NUM_LAYERS, NUM_EXPERTS, TOP_K = 3, 16, 2

SPARSE = Variant(
    "qwen3_moe",
    "sixteen experts",
    {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "moe_intermediate_size": 128,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    },
)

EXPERT_BYTES = 3 * 64 * 128 * 4

ROUNDING = 1.15
"""Reads are of whole pages of memory: up to two pages a tensor too much."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sparse")
    make(SPARSE, directory)
    return directory


def dense_bytes(model: Path) -> int:
    """What a sweep reads beside experts; the token table is read by rows."""
    spec = open_source(str(model), None, "auto").spec
    return sum(
        4 * tensor.num_values
        for layer in range(spec.num_schedule_layers)
        for tensor in owned_tensors(spec, layer)
        if tensor.expert is None and tensor.kind != "table"
    )


def sweep_bytes(model: Path, num_rows: int, offload_dir: Path, **options: Any) -> float:
    """Bytes of weights that a decode step of so many rows reads from disk, on average."""
    draw = random.Random(3)
    prompts = [[draw.randrange(3, 97) for _ in range(5)] for _ in range(num_rows)]
    moved = []
    with flexport.LLM(
        model,
        backend="cpu",
        dtype="float32",
        percent=[0, 0, 100, 0, 100, 0],
        offload_dir=offload_dir,
        **options,
    ) as llm:
        for num_new in (2, 12):
            llm.generate(prompts, SamplingParams(max_tokens=num_new, ignore_eos=True))
            moved.append(llm.report["moved_bytes"]["disk_to_host"])
    return float(moved[1] - moved[0]) / 10


def test_one_row_moves_the_experts_that_it_picks(model, nothing_left):
    found = sweep_bytes(model, 1, nothing_left)

    picked_bytes = NUM_LAYERS * TOP_K * EXPERT_BYTES
    assert dense_bytes(model) + picked_bytes <= found
    assert found <= ROUNDING * (dense_bytes(model) + picked_bytes)


@pytest.mark.parametrize("num_batches", [1, 8])
def test_many_rows_move_every_expert_once_whatever_their_batches(model, num_batches, nothing_left):
    batch_size = 64 // num_batches

    found = sweep_bytes(model, 64, nothing_left, batch_size=batch_size, num_batches=num_batches)

    all_bytes = dense_bytes(model) + NUM_LAYERS * NUM_EXPERTS * EXPERT_BYTES
    assert 0.9 * all_bytes <= found <= ROUNDING * all_bytes


def test_a_window_of_two_experts_is_enough(model, nothing_left, monkeypatch):
    monkeypatch.setattr("flexport.planner.footprint.EXPERT_WINDOW_BYTES", 1)

    found = sweep_bytes(model, 64, nothing_left, batch_size=16, num_batches=4)

    assert found <= ROUNDING * (dense_bytes(model) + NUM_LAYERS * NUM_EXPERTS * EXPERT_BYTES)

"""Packed checkpoints are read in place, and give the tokens of the numbers that they stand for.

A tiny model is packed by the forms' own rules, and unpacked again into a plain checkpoint, which
transformers continues.
"""

from __future__ import annotations

import pytest
import torch
from packed_models import CASES, Case, pack
from transformers import AutoModelForCausalLM

import flexport
from flexport.testing.families.mixes import MIXES, Reference, reference_from, run


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def packed(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A packed model, and how transformers continues some prompts with its numbers."""
    directory = tmp_path_factory.mktemp("packed")
    pack(case, directory / "whole", directory / "packed")
    model = AutoModelForCausalLM.from_pretrained(directory / "whole", dtype=torch.float32).eval()
    return reference_from(model, directory / "packed")


@pytest.mark.parametrize("mix", list(MIXES))
def test_packed_checkpoints_give_the_tokens_of_their_numbers(mix, packed, tmp_path):
    tokens, report = run(packed, MIXES[mix], tmp_path)

    assert tokens == packed.continuations
    assert all(
        report["peak_bytes"][tier] <= report["predicted"][f"{tier}_bytes"]
        for tier in ("device", "host", "disk")
    )


def test_packed_weights_rest_packed(packed):
    file_bytes = (packed.directory / "model.safetensors").stat().st_size

    with flexport.LLM(packed.directory, backend="cpu", dtype="float32") as llm:
        llm.generate(packed.prompts[:1], flexport.SamplingParams(max_tokens=2))
        placed = llm.report["placement"]["weights"]["device"]["bytes"]

    assert placed < file_bytes  # the file has a header

"""On an accelerator with an address space of its own the answer is the same, wherever things live.

The emulated device refuses what a real one refuses: host memory in device maths, more bytes than
there are, work that is not ordered after the copy it needs.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from typing import Any

import pytest
from flexport_emulated.backend import EmulatedBackend
from tier_mixes import (
    AMPLE,
    BLOCKS,
    LENGTHS,
    MIXES,
    any_mix,
    block_of,
    expected_of,
    is_unified,
    options,
    prompts_of,
    reference_of,
)
from torch.utils import backend_registration

import flexport
from flexport import SamplingParams

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


def needed(plan):
    return {
        "device_memory": plan.needs.device_bytes,
        "host_memory": plan.needs.host_bytes,
        "disk_memory": plan.needs.disk_bytes,
    }


@any_mix
def test_greedy_tokens_are_those_of_transformers_for_any_mix_of_tiers(
    number, percent, reference, continue_greedily, nothing_left
):
    found = reference_of(number, reference)

    with contextlib.closing(EmulatedBackend(unified=is_unified(number))) as device:
        chosen = options(found, device, percent, block_of(number), nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            ids = continue_greedily(llm, prompts_of(found), LENGTHS)
        del llm
        gc.collect()
        left_bytes = device.used_bytes

    assert ids == expected_of(found)
    assert left_bytes == 0


@pytest.mark.parametrize("block", [1, 2, 3], ids=["paced", "chunked", "both"])
@pytest.mark.parametrize("mix", [0, 2, 3], ids=["device", "disk", "mixed"])
def test_a_device_as_small_as_the_plan_says_is_large_enough(
    mix, block, reference, continue_greedily, plan_for, nothing_left
):
    """Where memory is unified, as for half of these, that size holds the host's part, too."""
    found, unified = reference(), (mix + block) % 2 == 0
    with contextlib.closing(EmulatedBackend(unified=unified)) as ample:
        chosen = options(found, ample, MIXES[mix], BLOCKS[block], nothing_left)
        budgets = needed(plan_for(prompts_of(found), LENGTHS, **chosen, **AMPLE))

    small = EmulatedBackend(memory_bytes=budgets["device_memory"], unified=unified)
    with contextlib.closing(small) as device:
        chosen = options(found, device, MIXES[mix], BLOCKS[block], nothing_left)
        with flexport.LLM(**chosen, **budgets) as llm:
            ids = continue_greedily(llm, prompts_of(found), LENGTHS)
            retries = llm.report["retries"]

    assert ids == expected_of(found)
    assert retries == []
    assert 0 < device.allocated_peak_bytes <= device.peak_bytes <= budgets["device_memory"]


def test_a_device_slower_than_its_host_gives_the_same_tokens(
    reference, continue_greedily, nothing_left
):
    """Copies that end late show a wait that is missing; compute that does, a copy too early."""
    found = reference()
    answers = []
    slow: list[dict[str, Any]] = [{"link_latency_s": 5e-4}, {"flops_per_s": 5e8}]
    for rates in slow:
        with contextlib.closing(EmulatedBackend(**rates)) as device:
            chosen = options(found, device, MIXES[3], BLOCKS[0], nothing_left)
            with flexport.LLM(**chosen, **AMPLE) as llm:
                answers.append(continue_greedily(llm, prompts_of(found), LENGTHS))

    assert answers == [expected_of(found)] * 2


def test_sampling_with_penalties_and_scoring_keep_to_the_device(reference, nothing_left):
    found = reference()
    params = SamplingParams(
        max_tokens=6,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        min_tokens=3,
        seed=5,
    )
    pairs = [(prompt, ids[:4]) for prompt, ids in zip(found.prompts, found.greedy, strict=True)]
    with contextlib.closing(EmulatedBackend()) as device:
        answers, scores = [], []
        for backend in ("cpu", device):
            chosen = options(found, backend, MIXES[3], BLOCKS[0], nothing_left)
            with flexport.LLM(**chosen, **AMPLE) as llm:
                outputs = llm.generate(found.prompts, params)
                answers.append([output.outputs[0].token_ids for output in outputs])
                scores.append(llm.score(pairs))

    assert answers[0] == answers[1]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert all(score.is_greedy for score in scores[1])


@pytest.mark.parametrize("number", [0, 17])
@pytest.mark.parametrize("lane", ["host_to_device", "device_to_host", "compute"])
def test_an_error_of_a_lane_reaches_the_caller_and_nothing_is_left(
    lane, number, reference, continue_greedily, nothing_left
):
    found = reference()

    with contextlib.closing(EmulatedBackend()) as device:
        chosen = options(found, device, MIXES[3], BLOCKS[0], nothing_left)
        error = OSError("the device fell off the bus")
        with flexport.LLM(**chosen, **AMPLE) as llm:
            continue_greedily(llm, prompts_of(found)[:1], [1])
            if lane == "compute":
                device.fail_kernel(number, error)
            else:
                device.fail_copy(lane, number, error)
            with pytest.raises(OSError, match="the device fell off the bus"):
                continue_greedily(llm, prompts_of(found), LENGTHS)
            left_open = [t.name for t in threading.enumerate() if t.name.startswith("flexport ")]
            files_left = list(nothing_left.iterdir())
            again = continue_greedily(llm, prompts_of(found), LENGTHS)

    assert left_open == []
    assert files_left == []
    assert again == expected_of(found)


def test_an_error_while_loading_is_not_told_to_the_next_job(
    reference, continue_greedily, nothing_left
):
    found = reference()

    with contextlib.closing(EmulatedBackend()) as device:
        chosen = options(found, device, MIXES[3], BLOCKS[0], nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            device.fail_copy("host_to_device", 0, OSError("the device fell off the bus"))
            with pytest.raises(OSError, match="the device fell off the bus"):
                continue_greedily(llm, prompts_of(found), LENGTHS)
            again = continue_greedily(llm, prompts_of(found), LENGTHS)

    assert again == expected_of(found)

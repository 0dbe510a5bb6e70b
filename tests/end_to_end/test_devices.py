"""The law worth most, on each plug-in for a device: the answer is the same, wherever things live.

On a real device where there is one; for CUDA everywhere, on a card made of threads; and for MPS on
a careless fake of what torch gives.
"""

from __future__ import annotations

import contextlib
import gc
import threading

import pytest
from fake_card import FakeCard
from fake_mps_runtime import FakeRuntime
from flexport_cuda.backend import CudaBackend
from flexport_mps.backend import MpsBackend
from tier_mixes import (
    AMPLE,
    LENGTHS,
    any_mix,
    block_of,
    expected_of,
    options,
    prompts_of,
    reference_of,
)
from torch.utils import backend_registration

import flexport
from flexport.registry import open_backend
from flexport.torch_ops.attention import forget

needs_python_devices = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


@pytest.mark.parametrize(
    "name",
    [pytest.param("cuda", marks=pytest.mark.cuda), pytest.param("mps", marks=pytest.mark.mps)],
)
@any_mix
def test_greedy_tokens_on_a_device_are_those_of_transformers_for_any_mix_of_tiers(
    name, number, percent, reference, continue_greedily, nothing_left
):
    found = reference_of(number, reference)

    with contextlib.closing(open_backend(name)[1]) as device:
        chosen = options(found, device, percent, block_of(number), nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            ids = continue_greedily(llm, prompts_of(found), LENGTHS)

    assert ids == expected_of(found)


@any_mix
def test_greedy_tokens_on_a_card_of_threads_are_those_of_transformers_for_any_mix_of_tiers(
    number, percent, reference, continue_greedily, nothing_left
):
    found, fake_card = reference_of(number, reference), FakeCard()

    with contextlib.closing(CudaBackend(fake_card)) as device:
        chosen = options(found, device, percent, block_of(number), nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            ids = continue_greedily(llm, prompts_of(found), LENGTHS)
        del llm
        device.sync()
        forget()
        gc.collect()
        left_bytes, spare_bytes = fake_card.arena_used_bytes, sum(fake_card.pinned.values())

    assert ids == expected_of(found)
    assert left_bytes == 0
    assert spare_bytes <= 64 << 20
    assert fake_card.pinned == {}


@needs_python_devices
@any_mix
def test_greedy_tokens_on_a_fake_of_mps_are_those_of_transformers_for_any_mix_of_tiers(
    number, percent, reference, continue_greedily, nothing_left
):
    found, runtime = reference_of(number, reference), FakeRuntime()

    with contextlib.closing(runtime), contextlib.closing(MpsBackend(runtime)) as device:
        chosen = options(found, device, percent, block_of(number), nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            ids = continue_greedily(llm, prompts_of(found), LENGTHS)
        del llm
        forget()
        device.sync()
        gc.collect()
        left_bytes = runtime.used_bytes

    assert ids == expected_of(found)
    assert left_bytes == 0
    # None of the core's own copies makes the host wait, and none comes from a thread of the store.
    assert set(runtime.copies) == {True}
    assert runtime.issuers == {threading.current_thread()}


@needs_python_devices
def test_half_precision_sampling_and_scoring_run_on_a_fake_of_mps(reference, nothing_left):
    """It has no float64, which no mix of dtypes may bring in unnoticed."""
    found, runtime = reference("125m-like", "float16"), FakeRuntime()
    params = flexport.SamplingParams(
        max_tokens=4,
        ignore_eos=True,
        temperature=0.8,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        repetition_penalty=1.3,
        min_tokens=3,
        seed=5,
    )
    pairs = [(prompt, ids[:4]) for prompt, ids in zip(found.prompts, found.greedy, strict=True)]

    with contextlib.closing(runtime), contextlib.closing(MpsBackend(runtime)) as device:
        chosen = options(found, device, [30, 30, 40, 30, 20, 40], {"batch_size": 4}, nothing_left)
        with flexport.LLM(**{**chosen, "dtype": "auto"}, **AMPLE) as llm:
            outputs = llm.generate(found.prompts, params)
            scores = llm.score(pairs)
    with flexport.LLM(
        **options(found, "cpu", [100, 0] * 3, {"batch_size": 4}, nothing_left)
    ) as llm:
        exact = llm.score(pairs)

    assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * 10
    assert scores == pytest.approx(exact, rel=0.05)


def test_half_precision_runs_on_a_card_of_threads(reference, nothing_left):
    found, fake_card = reference("125m-like", "float16"), FakeCard()
    params = flexport.SamplingParams(max_tokens=4, ignore_eos=True)

    with contextlib.closing(CudaBackend(fake_card)) as device:
        # One batch of a prompt of one length, and ragged ones: both fused kernels.
        chosen = options(found, device, [30, 30, 40, 30, 20, 40], {"batch_size": 4}, nothing_left)
        with flexport.LLM(**{**chosen, "dtype": "auto"}, **AMPLE) as llm:
            outputs = llm.generate([*found.prompts, *[found.prompts[9]] * 4], params)

    assert [len(output.outputs[0].token_ids) for output in outputs] == [4] * 14
    same = [output.outputs[0].token_ids for output in outputs[10:]]
    assert same == [same[0]] * 4

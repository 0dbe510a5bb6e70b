"""Budgets are hard caps: refused early where they are too small, and enough where they are not."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

import flexport
from flexport import SamplingParams
from flexport.errors import DoesNotFit, UsageError
from flexport.testing.discrete import DiscreteBackend

SIZE = re.compile(r"--(device|host|disk)-memory is .*?, and it takes (\d[^;]*?B)(?:;|$)")


def _asked_for(error: DoesNotFit) -> dict[str, str]:
    """The sizes that a refusal says would do."""
    return {f"{tier}_memory": size for tier, size in SIZE.findall(str(error))}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"percent": [100, 0, 100, 0, 100, 0]},
        {"percent": [0, 0, 0, 0, 0, 0], "batch_size": 3, "num_batches": 2},
        {"percent": [50, 25, 50, 25, 50, 25], "batch_size": 2, "num_batches": 3},
    ],
)
@pytest.mark.parametrize("discrete", [False, True])
def test_what_a_refusal_says_would_do_does(
    options, discrete, reference, continue_greedily, nothing_left
):
    found = reference()
    budgets: dict[str, Any] = {"device_memory": 1000, "host_memory": 1000}
    budgets["disk_memory"] = 0

    with closing(DiscreteBackend()) as backend:
        options = {
            **options,
            "backend": backend if discrete else "cpu",
            "dtype": "float32",
            "offload_dir": nothing_left,
        }

        def attempt(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
            with flexport.LLM(found.directory, **options, **budgets) as llm:
                ids: list[list[int]] = continue_greedily(llm, prompts, lengths)
                return ids

        with pytest.raises(DoesNotFit) as refusal:
            attempt(found.prompts, [14] * 10)
        budgets |= _asked_for(refusal.value)
        # Where the device can be asked before it is opened, that was for a row of one token.
        assert attempt([found.prompts[0]], [1]) == [found.continued(0, 1)]
        try:
            ids = attempt(found.prompts, [14] * 10)
        except DoesNotFit as error:
            assert not discrete
            budgets |= _asked_for(error)
            ids = attempt(found.prompts, [14] * 10)

    assert ids == found.greedy


def test_a_refusal_comes_before_any_weight_is_read(reference, nothing_left, monkeypatch):
    read: list[object] = []
    monkeypatch.setattr(
        "flexport.store.direct_io.DirectFile.read_into", lambda *args: read.append(args)
    )

    for budget in (1000, "720KiB"):  # less than any row takes, and less than this one does
        with (
            pytest.raises(DoesNotFit),
            flexport.LLM(
                reference().directory, device_memory=budget, offload_dir=nothing_left
            ) as llm,
        ):
            llm.generate([[5] * 100], SamplingParams(max_tokens=28))

    assert read == []


def test_what_never_fits_is_refused_without_torch(reference):
    """So that it takes a fraction of a second."""
    script = (
        "import sys, flexport\n"
        "try: flexport.LLM(sys.argv[1], device_memory=1000)\n"
        "except flexport.errors.DoesNotFit: assert 'torch' not in sys.modules\n"
        "else: raise AssertionError('it fits')\n"
    )

    subprocess.run([sys.executable, "-c", script, str(reference().directory)], check=True)


def test_memory_is_used_up_to_its_budget_and_never_beyond(
    reference, continue_greedily, plan_for, nothing_left
):
    found = reference()
    job = (found.prompts, [14] * 10)
    options: dict[str, Any] = {
        "model": found.directory,
        "dtype": "float32",
        "percent": [0, 0, 0, 0, 0, 0],
        "batch_size": 2,
        "num_batches": 3,
        "offload_dir": nothing_left,
    }
    least_bytes = plan_for(*job, **options, device_memory="64MiB").needs.device_bytes
    peaks = []

    for slack in (1.0, 4.0):
        budget = int(least_bytes * slack)
        with flexport.LLM(**options, device_memory=budget) as llm:
            assert continue_greedily(llm, *job) == found.greedy
            peaks.append(llm.report["peak_bytes"]["device"])
            assert llm.report["retries"] == []
            assert peaks[-1] <= budget

    # More look-ahead is what more memory is for.
    assert peaks[0] <= peaks[1]
    assert peaks[0] > 0.4 * least_bytes


def test_weights_that_an_earlier_job_left_in_memory_make_way_for_a_larger_job(
    reference, continue_greedily, plan_for, nothing_left
):
    found = reference()
    options: dict[str, Any] = {
        "model": found.directory,
        "dtype": "float32",
        "batch_size": 10,
        "num_batches": 1,
        "offload_dir": nothing_left,
    }
    tight: dict[str, Any] = {"percent": [0, 0, 100, 0, 100, 0], "device_memory": "64MiB"}
    budget = plan_for(found.prompts, [14] * 10, **options, **tight).needs.device_bytes

    with flexport.LLM(**options, device_memory=budget, disk_memory=0) as llm:
        short = continue_greedily(llm, [found.prompts[0]], [1])
        before = llm.plan
        long = continue_greedily(llm, found.prompts, [14] * 10)

    assert short == [found.continued(0, 1)]
    assert long == found.greedy
    assert before is not None
    assert llm.plan is not None
    assert llm.plan.policy.weights.device < before.policy.weights.device


def test_a_row_longer_than_the_model_is_refused_before_anything_runs(reference, nothing_left):
    engine = flexport.LLM(reference().directory, offload_dir=nothing_left).engine
    request = flexport.records.Request(
        request_id="0", token_ids=(5,) * 100, sampling=SamplingParams(max_tokens=30)
    )

    with engine, pytest.raises(UsageError, match="128 positions"):
        list(engine.generate([request]))

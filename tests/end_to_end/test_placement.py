"""Placement never changes the answer: greedy tokens are transformers', wherever tensors live."""

from __future__ import annotations

import gc
import os
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from flexport_emulated.backend import EmulatedBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils import backend_registration

import flexport
from flexport import Policy, SamplingParams
from flexport.testing.discrete import DiscreteBackend

AMPLE: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "1GiB"}
MEMORY_BYTES = 1 << 30
"""Of the fake device; what a run may use of it is its budget."""

_UNIT = st.integers(0, 100)
_PAIR = st.one_of(
    st.sampled_from([(100, 0), (0, 100), (0, 0)]),
    st.tuples(_UNIT, _UNIT).map(lambda pair: (pair[0], min(pair[1], 100 - pair[0]))),
)


@dataclass(frozen=True)
class Case:
    """One way to run one job."""

    variant: str
    dtype: str
    percent: list[int]
    shape: dict[str, int]
    beside: dict[str, bool]
    """What a CPU beside the device does, if there is one."""
    slack: float
    """The budgets are so many times what the plan says it needs."""
    rows: list[int]
    lengths: list[int]
    ends: list[bool]
    """Whether a row meets an end token of its own on the way."""


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rows = draw(st.lists(st.integers(0, 9), min_size=1, max_size=9))
    return Case(
        variant=draw(st.sampled_from(["125m-like", "350m-like", "galactica-like", "untied-like"])),
        dtype=draw(st.sampled_from(["float32", "float32", "float16", "bfloat16"])),
        percent=[*draw(_PAIR), *draw(_PAIR), *draw(_PAIR)],
        shape={
            "batch_size": draw(st.integers(1, 5)),
            "num_batches": draw(st.integers(1, 4)),
            # Small ones cut prompts into chunks and batches into bands.
            "prefill_tokens": draw(st.sampled_from([3, 8, 16, 50, 2048])),
            "sweep_tokens": draw(st.sampled_from([0, 0, 5, 20, 60])),
        },
        beside={
            "cpu_attention": draw(st.booleans()),
            "cpu_projections": draw(st.booleans()),
        },
        # From next to no look-ahead to all of it.
        slack=draw(st.sampled_from([1.0, 1.1, 1.5, 20.0])),
        rows=rows,
        lengths=draw(st.lists(st.integers(1, 14), min_size=len(rows), max_size=len(rows))),
        ends=draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows))),
    )


def tight(plan: Any, slack: float = 1.0) -> dict[str, Any]:
    """Budgets of what a plan needs, times the slack."""
    return {
        "device_memory": int(plan.needs.device_bytes * slack),
        "host_memory": int(plan.needs.host_bytes * slack),
        "disk_memory": int(plan.needs.disk_bytes * slack),
    }


def _job(case, found):
    """Prompts, how to go on with each, and what must come of it."""
    prompts = [found.prompts[row] for row in case.rows]
    params, expected = [], []
    for row, length, ends in zip(case.rows, case.lengths, case.ends, strict=True):
        ids = found.continued(row, length)
        end = ids[length // 2]
        expected.append(ids[: ids.index(end) + 1] if ends else ids)
        params.append(
            SamplingParams(
                max_tokens=length, ignore_eos=True, stop_token_ids=(end,) if ends else ()
            )
        )
    return prompts, params, expected


def _options(case, found, backend, offload_dir):
    weights, cache, activations = Policy.splits_from_percent(case.percent)
    beside = {} if backend == "cpu" else case.beside
    policy = Policy(weights=weights, cache=cache, activations=activations, **case.shape, **beside)
    return {
        "model": found.directory,
        "backend": backend,
        "dtype": "float32",
        "policy": policy,
        "offload_dir": offload_dir,
    }


def _check(case, backend, reference, plan_for, pool_bytes, offload_dir):
    found = reference(case.variant, case.dtype)
    prompts, params, expected = _job(case, found)
    options = _options(case, found, backend, offload_dir)
    plan = plan_for(prompts, case.lengths, **options, **AMPLE)

    budgets = tight(plan, case.slack)
    with flexport.LLM(**options, **budgets) as llm:
        first = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
        in_use_bytes = pool_bytes(llm)
        assert llm.report["retries"] == []
        again = llm.generate(prompts[::-1], params[::-1])
        second = [output.outputs[0].token_ids for output in again]
        in_use_later_bytes = pool_bytes(llm)

    assert first == expected
    assert second == expected[::-1]
    assert in_use_later_bytes == in_use_bytes
    assert in_use_bytes[2] == 0
    # Nor was it right only because a block that found no room was halved.
    assert llm.report["retries"] == []
    peak_bytes = llm.report["peak_bytes"]
    assert all(peak_bytes[tier] <= budgets[f"{tier}_memory"] for tier in ("device", "host", "disk"))


_settings = settings(
    max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "25")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@_settings
@given(case=cases())
def test_greedy_tokens_are_those_of_transformers_for_any_policy_where_memory_is_one_pool(
    case, reference, plan_for, pool_bytes, nothing_left
):
    _check(case, "cpu", reference, plan_for, pool_bytes, nothing_left)


@_settings
@given(case=cases(), late=st.booleans())
def test_greedy_tokens_are_those_of_transformers_for_any_policy_on_a_device_with_its_own_memory(
    case, late, reference, plan_for, pool_bytes, nothing_left
):
    with closing(DiscreteBackend(memory_bytes=MEMORY_BYTES, late=late)) as backend:
        _check(case, backend, reference, plan_for, pool_bytes, nothing_left)


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@settings(_settings, max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "15")))
@given(case=cases())
def test_a_device_that_has_what_the_plan_needs_to_the_byte_is_large_enough(
    case, reference, plan_for, nothing_left
):
    """Every byte that is alive on it counts: weights, caches and what operations give."""
    found = reference(case.variant, case.dtype)
    prompts, params, expected = _job(case, found)
    with closing(EmulatedBackend()) as ample:
        options = _options(case, found, ample, nothing_left)
        budgets = tight(plan_for(prompts, case.lengths, **options, **AMPLE))

    with closing(EmulatedBackend(memory_bytes=budgets["device_memory"])) as device:
        with flexport.LLM(**_options(case, found, device, nothing_left), **budgets) as llm:
            ids = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            report = llm.report
        del llm
        gc.collect()
        left_bytes = device.used_bytes

    assert ids == expected
    assert report["retries"] == []
    assert 0 < device.peak_bytes <= budgets["device_memory"]
    assert all(
        report["peak_bytes"][tier] <= budgets[f"{tier}_memory"] for tier in report["peak_bytes"]
    )
    assert left_bytes == 0


@pytest.mark.parametrize("variant", ["125m-like", "350m-like"])
def test_everything_on_disk_gives_the_tokens_that_everything_in_memory_gives(
    variant, reference, continue_greedily, nothing_left
):
    found = reference(variant)
    answers = []

    for share in (100, 0):
        with flexport.LLM(
            found.directory,
            dtype="float32",
            percent=[share, 0] * 3,
            device_memory="64MiB",
            offload_dir=nothing_left,
        ) as llm:
            answers.append(continue_greedily(llm, found.prompts, [14] * 10))

    assert answers[0] == answers[1] == found.greedy


def test_rows_of_which_none_fits_beside_another_in_the_positions_run_in_one_batch(
    reference, continue_greedily
):
    found = reference()
    longest, shortest = found.prompts[9], found.prompts[0]
    room = found.model.config.max_position_embeddings

    with flexport.LLM(found.directory, dtype="float32", device_memory="64MiB") as llm:
        ids = continue_greedily(llm, [longest, shortest], [3, room])

    assert ids[0] == found.continued(9, 3)
    assert ids[1][:14] == found.greedy[0]
    assert len(ids[1]) == room

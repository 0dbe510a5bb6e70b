"""A CPU beside the device: the same tokens, and small tensors cross the link in place of large ones."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from flexport_emulated.backend import EmulatedBackend, Link
from torch.utils import backend_registration

import flexport
from flexport import Policy, SamplingParams
from flexport.engine.host_compute import HostCompute
from flexport.errors import PolicyError
from flexport.records import Request

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

AMPLE: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "1GiB"}
LENGTHS = [14, 3, 9, 14, 1, 7, 14, 2, 14, 14]
"""Rows end at different steps, so that caches shrink."""

MIXES = {
    "all away": [0, 100, 0, 100, 100, 0],
    "cache on disk": [100, 0, 0, 0, 100, 0],
    "cache on all tiers": [30, 70, 30, 30, 0, 100],
    "weights on all tiers": [30, 30, 0, 100, 100, 0],
}

BLOCKS: list[dict[str, int]] = [
    {"batch_size": 4, "num_batches": 3},
    {"batch_size": 3, "num_batches": 4, "prefill_tokens": 8, "sweep_tokens": 20},
]


def policy_of(percent, **fields):
    weights, cache, activations = Policy.splits_from_percent(percent)
    return Policy(weights=weights, cache=cache, activations=activations, **fields)


def llm_on(device, found, policy, **options):
    return flexport.LLM(
        found.directory, backend=device, dtype="float32", policy=policy, **AMPLE, **options
    )


@pytest.mark.parametrize("number", range(len(MIXES)), ids=MIXES.keys())
@pytest.mark.parametrize("block", range(len(BLOCKS)), ids=["in step", "paced"])
def test_the_tokens_are_the_same(
    number, block, reference, continue_greedily, plan_for, nothing_left
):
    """Half of the checkpoints are in float16: half of those of each mix and each block."""
    found = reference("125m-like", ("float32", "float16")[(number + block) % 2])
    percent = list(MIXES.values())[number]
    policy = policy_of(percent, **BLOCKS[block], cpu_attention=True, cpu_projections=True)
    with contextlib.closing(EmulatedBackend()) as device:
        options = {
            "model": found.directory,
            "backend": device,
            "dtype": "float32",
            "policy": policy,
            "offload_dir": nothing_left,
        }
        needs = plan_for(found.prompts, LENGTHS, **options, **AMPLE).needs
        budgets = {
            "device_memory": needs.device_bytes,
            "host_memory": needs.host_bytes,
            "disk_memory": needs.disk_bytes,
        }
        with flexport.LLM(**options, **budgets) as llm:
            ids = continue_greedily(llm, found.prompts, LENGTHS)
            report = llm.report

    assert ids == [found.continued(row, length) for row, length in enumerate(LENGTHS)]
    assert report["busy_seconds"]["host_compute"] > 0
    assert report["peak_bytes"]["host"] <= needs.host_bytes


def moved_bytes(found, continue_greedily, percent, **fields):
    """Bytes that cross to and from the device for one row of 13 prompt tokens and 14 new ones."""
    with contextlib.closing(EmulatedBackend()) as device:
        policy = policy_of(percent, batch_size=1, **fields)
        with llm_on(device, found, policy) as llm:
            assert continue_greedily(llm, [found.prompts[6]], [14]) == [found.greedy[6]]
            moved = llm.report["moved_bytes"]
    return moved["host_to_device"], moved["device_to_host"]


def test_queries_and_results_cross_the_link_in_place_of_the_cache(reference, continue_greedily):
    found = reference()
    config = found.model.config
    state_bytes = 4 * config.hidden_size * config.num_hidden_layers
    on_host = [100, 0, 0, 100, 100, 0]

    up, down = moved_bytes(found, continue_greedily, on_host)
    up_beside, down_beside = moved_bytes(found, continue_greedily, on_host, cpu_attention=True)

    # 13 decode steps after the prompt: results go up; queries, keys and values come down, and
    # before that the prompt's keys and values, in whole pages of memory.
    assert up_beside == 13 * state_bytes
    assert down_beside == 3 * 13 * state_bytes + config.num_hidden_layers * 2 * 4096
    assert up > 10 * up_beside
    assert down > down_beside


class _Watched(EmulatedBackend):
    """Says when it is given attention to compute."""

    calls: list[str]

    def attention(self, q_NHLE, keys_NKGE, values_NKGE, spec):
        self.calls.append("device")
        return super().attention(q_NHLE, keys_NKGE, values_NKGE, spec)


def test_the_device_has_its_work_before_the_cpu_begins_its_own(
    reference, continue_greedily, monkeypatch
):
    found = reference()
    calls: list[str] = []
    for name in ("send", "attention"):
        method = getattr(HostCompute, name)

        def told(self, *args, name=name, method=method):
            calls.append({"send": "sent", "attention": "cpu"}[name])
            return method(self, *args)

        monkeypatch.setattr(HostCompute, name, told)
    policy = policy_of([100, 0, 50, 50, 100, 0], batch_size=4, num_batches=2, cpu_attention=True)
    with contextlib.closing(_Watched()) as device:
        device.calls = calls
        with llm_on(device, found, policy) as llm:
            continue_greedily(llm, found.prompts[3:7] * 2, [9] * 8)

    in_prefill = calls.index("sent")
    visits = 2 * found.model.config.num_hidden_layers * 8
    assert calls[:in_prefill] == ["device"] * in_prefill
    assert calls[in_prefill:] == ["sent", "device", "cpu"] * visits


def test_states_cross_the_link_in_place_of_projections(reference, continue_greedily):
    found = reference()
    config = found.model.config
    state_bytes = 4 * config.hidden_size * config.num_hidden_layers
    projection_bytes = 3 * config.hidden_size * state_bytes
    on_host = [0, 100, 100, 0, 100, 0]

    up, down = moved_bytes(found, continue_greedily, on_host)
    up_beside, down_beside = moved_bytes(found, continue_greedily, on_host, cpu_projections=True)

    # The prompt's sweep streams all weights. 13 steps stream the rest of them, in more parts, each
    # of which begins and ends with a page of memory.
    spared_bytes = 13 * (projection_bytes - 3 * state_bytes)
    parts_bytes = 13 * 4 * 4096 * config.num_hidden_layers
    assert spared_bytes - parts_bytes <= up - up_beside <= spared_bytes
    assert (down, down_beside) == (0, 13 * state_bytes)


def test_an_error_on_the_way_reaches_the_caller_and_the_next_job_is_right(
    reference, continue_greedily, nothing_left
):
    found = reference()
    policy = policy_of(
        MIXES["all away"], batch_size=5, num_batches=2, cpu_attention=True, cpu_projections=True
    )
    with (
        contextlib.closing(EmulatedBackend()) as device,
        llm_on(device, found, policy, offload_dir=nothing_left) as llm,
    ):
        continue_greedily(llm, found.prompts[:1], [1])
        faults: list[tuple[Link, int]] = [
            ("device_to_host", 9),
            ("host_to_device", 40),
            ("device_to_host", 60),
        ]
        for lane, number in faults:
            device.fail_copy(lane, number, OSError("the device fell off the bus"))
            with pytest.raises(OSError, match="the device fell off the bus"):
                continue_greedily(llm, found.prompts, LENGTHS)
        outputs = continue_greedily(llm, found.prompts, LENGTHS)

    assert outputs == [found.continued(row, length) for row, length in enumerate(LENGTHS)]


def test_a_job_that_is_not_finished_leaves_the_engine_ready(
    reference, continue_greedily, pool_bytes, nothing_left
):
    found = reference()
    policy = policy_of(MIXES["all away"], batch_size=5, num_batches=2, cpu_attention=True)
    with (
        contextlib.closing(EmulatedBackend()) as device,
        llm_on(device, found, policy, offload_dir=nothing_left) as llm,
    ):
        continue_greedily(llm, found.prompts, LENGTHS)
        in_use_bytes = pool_bytes(llm)
        requests = [
            Request(
                request_id=str(row),
                prompt=None,
                token_ids=tuple(prompt),
                sampling=SamplingParams(max_tokens=9),
            )
            for row, prompt in enumerate(found.prompts)
        ]
        completions: Any = llm.engine.generate(requests)
        first = next(completions)
        completions.close()
        again = continue_greedily(llm, found.prompts, LENGTHS)
        in_use_later_bytes = pool_bytes(llm)

    assert first.token_ids
    assert again == [found.continued(row, length) for row, length in enumerate(LENGTHS)]
    assert in_use_later_bytes == in_use_bytes


@pytest.mark.parametrize("field", ["cpu_attention", "cpu_projections"])
def test_where_memory_is_one_there_is_nothing_to_spare_and_it_says_so(field, reference):
    policy = policy_of([100, 0] * 3, **{field: True})

    with pytest.raises(PolicyError, match="device with memory of its own"):
        flexport.LLM(reference().directory, backend="cpu", policy=policy)

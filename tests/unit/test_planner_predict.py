"""How long a job takes: the closed form and the rehearsal, which is the loop's own order of visits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from round_machine import KIB, LAYER_BYTES, computer, costs_of, machine, model

from flexport.engine.rehearsal import _Stage, rehearse
from flexport.planner.costs import Prompts, Steps, Visit, VisitCost
from flexport.planner.footprint import JobSizes
from flexport.planner.machine import Lane
from flexport.planner.predict import predict
from flexport.policy import Policy, Split

HOST, DISK = Split(device=0, host=1), Split(device=0, disk=1)
ROOM_BYTES = 1 << 40
JOB = JobSizes(prompt_tokens=100, new_tokens=33, num_rows=8)
BATCH = [(100, 33)] * 4


@st.composite
def splits(draw):
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Split(device=device / 100, host=host / 100, disk=(100 - device - host) / 100)


POLICIES = st.builds(
    Policy,
    weights=splits(),
    cache=splits(),
    activations=st.just(Split()),
    batch_size=st.sampled_from([1, 4]),
    num_batches=st.sampled_from([1, 3]),
    compress_cache=st.sampled_from(["none", "int8"]),
    cpu_attention=st.booleans(),
)
RATES = st.floats(0.1, 10)
MACHINES = st.builds(
    lambda disk, link, device, host: machine(
        disk_read=Lane(bytes_per_s=disk * 100 * KIB),
        disk_write=Lane(bytes_per_s=disk * 50 * KIB),
        up=Lane(bytes_per_s=link * 1000 * KIB),
        down=Lane(bytes_per_s=link * 500 * KIB),
        device=computer(cache_bytes_per_s={1: device * 1024 * KIB}, visit_s=device),
        host=computer(cache_bytes_per_s={1: host * 512 * KIB}),
    ),
    RATES,
    RATES,
    RATES,
    RATES,
)


def deep(num_layers):
    """A model with so many decoder layers, beside which the first and the last are little."""
    sizes = model(layer_bytes=(KIB, *(LAYER_BYTES,) * num_layers, KIB), table_bytes=KIB)
    small = replace(sizes, expert_bytes=(0,) * (num_layers + 2))
    caches = tuple(replace(cache, num_layers=num_layers) for cache in small.caches)
    return replace(small, caches=caches)


def test_all_in_memory_takes_what_its_visits_compute():
    costs = costs_of(Policy(batch_size=4, num_batches=2), job=JOB)
    prompts = Visit(prompts=(Prompts(rows=4, end=100),), sampled=4)
    total = VisitCost()
    for layer in range(5):
        total.add(costs.visit(layer, prompts), 2)
        for step in range(1, 33):
            steps = (Steps(rows=4, columns=100 + step, decoded=step, last=32),)
            total.add(costs.visit(layer, Visit(steps=steps, sampled=4)), 2)

    closed, told = predict(costs), rehearse(costs, [BATCH] * 2, ROOM_BYTES)

    for prediction in (closed, told):
        assert prediction.run_s == pytest.approx(total.compute_s)
        assert prediction.busy_s["compute"] == pytest.approx(total.compute_s)
        assert prediction.new_tokens == 8 * 33
        assert prediction.tok_s == pytest.approx(8 * 33 / total.compute_s)
        assert prediction.limited_by == "compute"
        assert not any(prediction.moved_bytes.values())


def test_what_streams_takes_as_long_as_its_lane():
    """The disk gives a layer in 10.5 s; computing takes next to nothing."""
    quick = computer(
        visit_s=0, touched_values_per_s=1e9, sampled_values_per_s=1e9,
        prompt_attention_flops_per_s=1e9, cache_bytes_per_s={1: 1e12},
    )  # fmt: skip
    costs = costs_of(
        Policy(weights=DISK, batch_size=4, num_batches=2), job=JOB, machine=machine(device=quick)
    )

    closed, told = predict(costs), rehearse(costs, [BATCH] * 2, 3 * LAYER_BYTES)

    # Four layers, since the first one's table does not stream; and 33 sweeps. Rows of the table are
    # read beside that, when they are asked for.
    assert closed.run_s == pytest.approx(33 * 4 * 10.5, rel=0.005)
    # The last product has to wait for the last byte.
    assert 0.995 * closed.run_s <= told.run_s <= closed.run_s + 10
    assert closed.limited_by == told.limited_by == "disk_to_host"
    assert closed.moved_bytes == pytest.approx(told.moved_bytes)
    assert told.moved_bytes["disk_to_host"] == 33 * 4 * LAYER_BYTES


@settings(max_examples=30)
@given(policy=POLICIES, machine=MACHINES)
def test_the_closed_form_is_what_the_rehearsal_finds_where_there_is_room_to_fetch_ahead(
    policy, machine
):
    """It leaves out how the first and the last visit stand alone, and that what the first decode
    steps need may come while the last prompts are computed."""
    sizes = deep(12)
    job = JobSizes(prompt_tokens=100, new_tokens=33, num_rows=policy.block_size)
    work = replace(costs_of(policy).work, order=(0,) * 12)
    costs = costs_of(policy, job=job, machine=machine, model=sizes, work=work)
    batches = [[(100, 33)] * policy.batch_size] * policy.num_batches
    busiest = max(costs.visit(1, v).staged_bytes for v in _visits(policy.batch_size))

    closed, told = predict(costs), rehearse(costs, batches, 4 * busiest)

    assert 0.95 * told.run_s <= closed.run_s <= 1.05 * told.run_s + closed.prefill_s
    assert closed.moved_bytes == pytest.approx(told.moved_bytes)
    assert closed.busy_s == pytest.approx(told.busy_s)


def _visits(rows):
    yield Visit(prompts=(Prompts(rows=rows, end=100),))
    yield Visit(steps=(Steps(rows=rows, columns=132, decoded=32, last=32),))


@settings(max_examples=25)
@given(policy=POLICIES, machine=MACHINES, few=st.integers(0, 3), more=st.integers(1, 3))
def test_more_room_to_fetch_ahead_never_takes_longer(policy, machine, few, more):
    costs = costs_of(policy, job=JOB, machine=machine)
    batches = [[(100, 9)] * policy.batch_size] * (2 * policy.num_batches)
    room_bytes = few * LAYER_BYTES

    tight = rehearse(costs, batches, room_bytes)
    ample = rehearse(costs, batches, room_bytes + more * LAYER_BYTES)

    assert ample.run_s <= tight.run_s * (1 + 1e-9)
    assert ample.moved_bytes == pytest.approx(tight.moved_bytes)
    assert ample.run_s >= max(ample.busy_s[lane] for lane in ample.busy_s) * (1 - 1e-9)


@pytest.mark.parametrize(
    "policy",
    [
        Policy(weights=DISK, cache=HOST, batch_size=2, num_batches=2),
        Policy(weights=DISK, cache=DISK, batch_size=2, num_batches=3, prefill_tokens=32),
        Policy(weights=HOST, batch_size=2, num_batches=3, sweep_tokens=60),
    ],
)
def test_every_token_passes_every_layer_once(policy, monkeypatch):
    """Rows of all lengths, which end at different steps."""
    rows = [[(30, 3), (30, 9)], [(17, 1), (16, 6)], [(9, 4), (1, 2)]]
    costs = costs_of(policy, job=JobSizes(prompt_tokens=30, new_tokens=9, num_rows=6))
    passed: Counter[int] = Counter()
    compute = _Stage.compute

    def watched(stage, visit):
        passed[visit.layer] += stage._counted(visit).tokens
        compute(stage, visit)

    monkeypatch.setattr(_Stage, "compute", watched)

    told = rehearse(costs, rows, ROOM_BYTES)

    tokens = sum(prompt + new - 1 for batch in rows for prompt, new in batch)
    assert passed == dict.fromkeys(range(5), tokens)
    assert told.new_tokens == sum(new for batch in rows for _, new in batch)
    assert told.prefill_s > 0 < told.decode_s

"""Half a block has half the rows, the same shares, and never takes more."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.plan import model_sizes
from flexport.engine.stored import TensorSize
from flexport.models import known_config, spec_of
from flexport.planner.footprint import JobSizes, LayerCaches, footprint
from flexport.planner.halving import halved, left_over
from flexport.policy import Budgets, Policy, Split

MODEL = model_sizes(
    spec_of(known_config("facebook/opt-125m") or {}),
    lambda tensor: TensorSize.plain(tensor, 2, 2),
    2,
)
TINY = replace(
    MODEL,
    layer_bytes=(9000, 7000, 7000, 9000),
    expert_bytes=(0, 0, 0, 0),
    caches=(LayerCaches(num_layers=2, plane_token_bytes=128),),
    hidden_token_bytes=128,
)
"""So small that whole pages of memory count for more than what lies in them."""


@st.composite
def splits(draw):
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Split(device=device / 100, host=host / 100, disk=(100 - device - host) / 100)


@st.composite
def policies(draw):
    return Policy(
        weights=draw(splits()),
        cache=draw(splits()),
        activations=draw(splits()),
        batch_size=draw(st.integers(1, 64)),
        num_batches=draw(st.integers(1, 9)),
        prefill_tokens=draw(st.sampled_from([3, 100, 129, 500, 2048])),
        sweep_tokens=draw(st.sampled_from([0, 1, 60, 501])),
        cpu_attention=draw(st.booleans()),
        cpu_projections=draw(st.booleans()),
    )


jobs = st.builds(
    JobSizes,
    prompt_tokens=st.integers(1, 300),
    new_tokens=st.integers(1, 40),
    num_rows=st.none() | st.integers(1, 400),
)


@given(
    policy=policies(),
    job=jobs,
    unified=st.booleans(),
    addressable=st.booleans(),
    model=st.sampled_from([MODEL, TINY]),
)
def test_half_a_block_takes_no_more_of_any_tier_and_ends_at_one_row(
    policy, job, unified, addressable, model
):
    rows = policy.block_size if job.num_rows is None else min(policy.block_size, job.num_rows)
    before = footprint(model, job, policy, 16, unified, addressable)

    while (smaller := halved(policy, job)) is not None:
        after = footprint(model, job, smaller, 16, unified, addressable)
        assert (smaller.weights, smaller.cache, smaller.activations) == (
            policy.weights,
            policy.cache,
            policy.activations,
        )
        assert 1 <= smaller.block_size <= policy.block_size / 2
        assert smaller.block_size < rows
        assert (smaller.sweep_tokens > 0) == (policy.sweep_tokens > 0)
        assert after.device_bytes <= before.device_bytes
        assert after.host_bytes <= before.host_bytes
        assert after.disk_bytes <= before.disk_bytes
        policy, before, rows = smaller, after, smaller.block_size

    assert rows == 1


def test_batches_go_before_rows_and_rows_that_do_not_exist_go_first():
    shapes = []
    policy: Policy | None = Policy(batch_size=8, num_batches=8, sweep_tokens=300)

    while policy is not None:
        shapes.append((policy.num_batches, policy.batch_size, policy.sweep_tokens))
        policy = halved(policy, JobSizes(prompt_tokens=9, new_tokens=9, num_rows=20))

    # Of the 64 rows there are only 20, in three batches.
    assert shapes == [(8, 8, 300), (1, 8, 150), (1, 4, 75), (1, 2, 38), (1, 1, 19)]


@given(
    policy=policies(),
    job=jobs,
    unified=st.booleans(),
    slack=st.floats(1, 3),
    share=st.floats(0, 1),
)
def test_what_is_left_over_holds_the_smaller_block_and_is_within_the_budgets(
    policy, job, unified, slack, share
):
    before = footprint(MODEL, job, policy, 16, unified)
    smaller = halved(policy, job)
    if smaller is None:
        return
    after = footprint(MODEL, job, smaller, 16, unified)
    budgets = Budgets(
        device_bytes=int(before.device_bytes * slack),
        host_bytes=int(before.host_bytes * slack),
        disk_bytes=before.disk_bytes,
    )
    held_bytes = (int(budgets.device_bytes * share), int(budgets.host_bytes * share))

    left = left_over(budgets, held_bytes, before, after)

    assert after.device_bytes <= left.device_bytes <= budgets.device_bytes
    assert after.host_bytes <= left.host_bytes <= budgets.host_bytes
    assert left.disk_bytes == budgets.disk_bytes
    # What the smaller block spares is nobody's.
    spared_bytes = before.device_bytes - after.device_bytes
    assert left.device_bytes <= max(after.device_bytes, held_bytes[0] - spared_bytes)

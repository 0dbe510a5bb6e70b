"""`--policy auto`: within the budgets, never worse for more of them, and honest about too little."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexport.engine.plan import model_sizes
from flexport.engine.stored import TensorSize
from flexport.errors import DoesNotFit
from flexport.models import known_config, spec_of
from flexport.planner.auto import (
    Choice,
    check,
    choose,
    predicted_tok_s,
    typical_rates,
    within,
)
from flexport.planner.footprint import JobSizes, footprint
from flexport.policy import Budgets, Policy, Split
from flexport.units import parse_bytes

MIB = 1 << 20
MODEL = model_sizes(
    spec_of(known_config("facebook/opt-1.3b") or {}),
    lambda tensor: TensorSize.plain(tensor, 2, 2),
    2,
)
PAGE_TOKENS = 64

JOBS = st.builds(
    JobSizes,
    prompt_tokens=st.integers(1, 1024),
    new_tokens=st.integers(1, 512),
    num_rows=st.one_of(st.none(), st.integers(1, 300)),
)
BUDGETS = st.builds(
    Budgets,
    device_bytes=st.integers(300 * MIB, 40_000 * MIB),
    host_bytes=st.integers(300 * MIB, 40_000 * MIB),
    disk_bytes=st.sampled_from([0, 2_000 * MIB, 500_000 * MIB]),
)

# A choice looks at hundreds of policies, and takes some tenths of a second.
_settings = settings(max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "30")))


def pick(job, budgets, unified, fixed=None):
    return choose(MODEL, job, budgets, page_tokens=PAGE_TOKENS, unified=unified, fixed=fixed)


def needs_of(job, policy, unified):
    return footprint(MODEL, job, policy, PAGE_TOKENS, unified)


@_settings
@given(job=JOBS, budgets=BUDGETS, unified=st.booleans())
def test_the_chosen_policy_fits_or_there_is_a_refusal_that_says_what_would(job, budgets, unified):
    try:
        policy = pick(job, budgets, unified)
    except DoesNotFit as refusal:
        sizes = {
            f"{tier}_bytes": parse_bytes(size)
            for tier, size in re.findall(r"--(\w+)-memory is .*?takes ([^;]+)", str(refusal))
        }
        assert sizes
        enough = Budgets(
            device_bytes=sizes.get("device_bytes", budgets.device_bytes),
            host_bytes=sizes.get("host_bytes", budgets.host_bytes),
            disk_bytes=sizes.get("disk_bytes", budgets.disk_bytes),
        )
        policy = pick(job, enough, unified)
        assert within(needs_of(job, policy, unified), enough)
    else:
        assert within(needs_of(job, policy, unified), budgets)


@_settings
@given(job=JOBS, budgets=BUDGETS, more=st.integers(0, 20_000 * MIB), unified=st.booleans())
def test_more_memory_never_predicts_less(job, budgets, more, unified):
    def predicted(found):
        try:
            policy = pick(job, found, unified)
        except DoesNotFit:
            return 0.0
        return predicted_tok_s(MODEL, job, policy, typical_rates(unified), unified)

    larger = Budgets(
        device_bytes=budgets.device_bytes + more,
        host_bytes=budgets.host_bytes,
        disk_bytes=budgets.disk_bytes,
    )

    # A share is found to 1/16384, and of policies within 0.1 % the smaller block is taken.
    assert predicted(larger) >= 0.99 * predicted(budgets)


@pytest.mark.parametrize("unified", [True, False])
def test_a_budget_holds_more_rows_of_a_model_with_windows(unified):
    cache = MODEL.caches[0]
    half = cache.num_layers // 2
    full, windowed = replace(cache, num_layers=half), replace(cache, num_layers=half, window=256)
    mixed = replace(MODEL, caches=(full, windowed))
    job = JobSizes(prompt_tokens=1800, new_tokens=128)
    # The weights and 24 rows' whole cache.
    num_bytes = MODEL.weight_bytes + 24 * job.columns * MODEL.cache_token_bytes
    budgets = Budgets(device_bytes=num_bytes, host_bytes=400 * MIB, disk_bytes=0)
    rates = typical_rates(unified)
    rows, predicted = {}, {}

    for name, model in {"full": MODEL, "mixed": mixed}.items():
        policy = choose(model, job, budgets, page_tokens=PAGE_TOKENS, unified=unified)
        rows[name] = policy.block_size
        predicted[name] = predicted_tok_s(model, job, policy, rates, unified)

    assert rows["mixed"] >= 1.3 * rows["full"]
    assert predicted["mixed"] > predicted["full"]


def test_a_step_is_predicted_to_read_what_windows_show():
    """With rows enough for the cache to be all that counts."""
    cache, job = MODEL.caches[0], JobSizes(prompt_tokens=1948, new_tokens=100)
    windowed = replace(MODEL, caches=(replace(cache, window=222),))
    policy = Policy(cache=Split(device=0, disk=1), batch_size=256, num_batches=64)

    times = [
        1 / predicted_tok_s(model, job, policy, typical_rates(True), True)
        for model in (replace(MODEL, token_flops=1), replace(windowed, token_flops=1))
    ]

    assert times[0] == pytest.approx(9 * times[1], rel=0.01)


@_settings
@given(job=JOBS, budgets=BUDGETS, addressable=st.booleans())
def test_where_memory_is_unified_nothing_is_homed_on_the_host(job, budgets, addressable):
    facts = {"page_tokens": PAGE_TOKENS, "unified": True, "addressable": addressable}
    try:
        policy = choose(MODEL, job, budgets, **facts)
    except DoesNotFit:
        return

    needs = footprint(MODEL, job, policy, PAGE_TOKENS, True, addressable)
    assert policy.weights.host == policy.cache.host == policy.activations.host == 0
    assert within(needs, budgets)
    assert needs.device_bytes <= budgets.device_bytes + budgets.host_bytes


@_settings
@given(job=JOBS, unified=st.booleans())
def test_what_fits_in_memory_stays_there(job, unified):
    ample = Budgets(device_bytes=10**13, host_bytes=10**13, disk_bytes=10**13)

    policy = pick(job, ample, unified)

    assert policy.weights == policy.cache == policy.activations == Split()


def test_what_was_fixed_is_obeyed():
    fixed = Choice(
        weights=Split(device=0.3, host=0.3, disk=0.4),
        batch_size=5,
        num_batches=3,
        prefill_tokens=77,
        sweep_tokens=123,
    )
    budgets = Budgets(device_bytes=20_000 * MIB, host_bytes=20_000 * MIB, disk_bytes=0)

    policy = pick(JobSizes(prompt_tokens=100, new_tokens=20), budgets, False, fixed)

    assert policy.weights == fixed.weights
    assert (policy.batch_size, policy.num_batches) == (5, 3)
    assert (policy.prefill_tokens, policy.sweep_tokens) == (77, 123)


def test_a_policy_that_was_given_is_checked_tier_by_tier():
    job = JobSizes(prompt_tokens=100, new_tokens=20)
    needs = needs_of(job, Policy(cache=Split(device=0, disk=1)), False)
    budgets = Budgets(device_bytes=needs.device_bytes, host_bytes=needs.host_bytes, disk_bytes=MIB)

    with pytest.raises(DoesNotFit, match=r"--disk-memory is 1.00 MiB") as refusal:
        check(needs, Policy(), budgets)

    assert "--device-memory" not in str(refusal.value)


def test_a_block_is_no_larger_than_the_job():
    ample = Budgets(device_bytes=10**12, host_bytes=10**12, disk_bytes=10**12)

    policy = pick(JobSizes(prompt_tokens=10, new_tokens=10, num_rows=3), ample, True)

    assert policy.block_size == 3


def test_short_prompts_pass_together_even_if_nothing_is_decoded():
    job = JobSizes(prompt_tokens=16, new_tokens=1, num_rows=64)
    plenty = Budgets(device_bytes=16_000 * MIB, host_bytes=16_000 * MIB, disk_bytes=0)

    policy = pick(job, plenty, unified=True)

    # One row after another would read all weights for 16 tokens at a time.
    assert policy.block_size == job.num_rows


def test_prompts_are_paced_where_weights_stream_to_a_job_of_several_blocks():
    """Prefill is bound by compute and decode by the disk, so together they take the longer of both."""
    job = JobSizes(prompt_tokens=128, new_tokens=32, num_rows=500)
    tight = Budgets(device_bytes=1200 * MIB, host_bytes=0, disk_bytes=500_000 * MIB)
    ample = Budgets(device_bytes=20_000 * MIB, host_bytes=0, disk_bytes=500_000 * MIB)

    paced = pick(job, tight, unified=True)

    assert paced.sweep_tokens > 0
    lockstep = pick(job, tight, unified=True, fixed=Choice(sweep_tokens=0))
    speeds = [
        predicted_tok_s(MODEL, job, each, typical_rates(True), True) for each in (lockstep, paced)
    ]
    assert speeds[1] > 1.1 * speeds[0]
    assert pick(job, ample, unified=True).sweep_tokens == 0


CACHE_AWAY = Choice(weights=Split(), cache=Split(device=0, host=1))
PLENTY = Budgets(device_bytes=10**11, host_bytes=10**11, disk_bytes=10**11)


@pytest.mark.parametrize(("link_bytes_per_s", "on_cpu"), [(1e9, True), (1e12, False)])
def test_the_cpu_attends_where_the_link_is_what_holds_the_run_back(link_bytes_per_s, on_cpu):
    job = JobSizes(prompt_tokens=512, new_tokens=64, num_rows=64)
    rates = replace(typical_rates(False), link_bytes_per_s=link_bytes_per_s)

    policy = choose(
        MODEL,
        job,
        PLENTY,
        page_tokens=PAGE_TOKENS,
        unified=False,
        fixed=CACHE_AWAY,
        rates=rates,
    )

    assert policy.cpu_attention is on_cpu


@pytest.mark.parametrize(("num_rows", "projects"), [(1, True), (256, False)])
def test_the_cpu_projects_for_few_rows_of_a_link_bound_job(num_rows, projects):
    job = JobSizes(prompt_tokens=16, new_tokens=64, num_rows=num_rows)
    fixed = Choice(weights=Split(device=0, host=1), cache=Split(), sweep_tokens=0)
    rates = replace(typical_rates(False), link_bytes_per_s=6e10)

    policy = choose(
        MODEL, job, PLENTY, page_tokens=PAGE_TOKENS, unified=False, fixed=fixed, rates=rates
    )

    assert policy.cpu_projections is projects


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_asked_of_the_cpu_is_obeyed(asked):
    fixed = replace(CACHE_AWAY, cpu_attention=asked, cpu_projections=asked)

    policy = pick(JobSizes(prompt_tokens=100, new_tokens=20), PLENTY, False, fixed)

    assert (policy.cpu_attention, policy.cpu_projections) == (asked, asked)


@_settings
@given(job=JOBS, budgets=BUDGETS)
def test_where_memory_is_one_the_cpu_has_nothing_to_do_beside_the_device(job, budgets):
    try:
        policy = pick(job, budgets, True)
    except DoesNotFit:
        return

    assert not (policy.cpu_attention or policy.cpu_projections)


@_settings
@given(
    codec=st.sampled_from(["none", "int8", "int4"]),
    job=JOBS,
    budgets=BUDGETS,
    unified=st.booleans(),
)
def test_a_cache_is_packed_if_that_was_asked_for_and_then_no_prompt_is_shared_out(
    codec, job, budgets, unified
):
    try:
        policy = pick(job, budgets, unified, Choice(compress_cache=codec))
    except DoesNotFit:
        return

    assert policy.compress_cache == codec
    assert codec == "none" or policy.sweep_tokens == 0
    assert within(needs_of(job, policy, unified), budgets)


def test_a_packed_cache_has_room_for_more_rows():
    job = JobSizes(prompt_tokens=1000, new_tokens=64)
    budgets = Budgets(device_bytes=8000 * MIB, host_bytes=0, disk_bytes=0)
    resident = Choice(weights=Split(), cache=Split(), sweep_tokens=0)

    rows = {
        codec: pick(job, budgets, True, replace(resident, compress_cache=codec)).block_size
        for codec in ("none", "int8", "int4")
    }

    assert rows["int8"] > 1.3 * rows["none"]
    assert rows["int4"] > 1.3 * rows["int8"]


@pytest.mark.parametrize(("codec", "ratio"), [("int8", 9 / 16), ("int4", 4.5 / 16)])
def test_a_packed_cache_on_disk_is_predicted_to_move_its_own_bytes(codec, ratio):
    """Where the disk is what holds the run back, and of long prompts the cache is all that counts."""
    job = JobSizes(prompt_tokens=2000, new_tokens=200, num_rows=64)
    policy = Policy(cache=Split(device=0, disk=1), batch_size=64)
    rates = replace(
        typical_rates(True),
        disk_bytes_per_s=1e6,
        flops_per_s=1e18,
        memory_bytes_per_s=1e15,
        unpack_bytes_per_s=1e15,
    )

    speed, packed = (
        predicted_tok_s(MODEL, job, each, rates, True)
        for each in (policy, replace(policy, compress_cache=codec))
    )

    assert speed / packed == pytest.approx(ratio, rel=0.01)


# ---- few values


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_few_values_are_predicted_to_cross_the_link_and_all_keys(share):
    """Where the link is what holds the run back, and of long prompts the cache is all that counts."""
    job = JobSizes(prompt_tokens=2000, new_tokens=200, num_rows=64)
    policy = Policy(cache=Split(device=0, host=1), batch_size=64)
    rates = replace(
        typical_rates(False), link_bytes_per_s=1e6, flops_per_s=1e18, memory_bytes_per_s=1e15
    )

    speed, few = (
        predicted_tok_s(MODEL, job, each, rates, False)
        for each in (policy, replace(policy, attn_sparsity=share))
    )

    assert speed / few == pytest.approx((1 + share) / 2, rel=0.01)


@_settings
@given(job=JOBS, budgets=BUDGETS, unified=st.booleans())
def test_few_values_are_added_up_if_that_was_asked_for(job, budgets, unified):
    try:
        policy = pick(job, budgets, unified, Choice(attn_sparsity=0.1))
    except DoesNotFit:
        return

    assert policy.attn_sparsity == 0.1
    assert within(needs_of(job, policy, unified), budgets)

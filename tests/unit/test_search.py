"""`--policy auto`: within the budgets, the best there is, and honest about too little."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexport.engine.model_work import model_work
from flexport.engine.plan import model_sizes
from flexport.engine.stored import TensorSize
from flexport.errors import DoesNotFit
from flexport.models import known_config, spec_of
from flexport.planner.footprint import JobSizes
from flexport.planner.machine import Computer, Curve, Lane, Machine
from flexport.planner.refusal import check, within
from flexport.planner.search import choose, frontier, gains, need_room
from flexport.planner.shares import best_shares
from flexport.planner.task import Choice, Task
from flexport.policy import Budgets, Policy, Split
from flexport.units import parse_bytes

MIB = 1 << 20
SPEC = spec_of(known_config("facebook/opt-1.3b") or {})
SIZES = model_sizes(SPEC, lambda tensor: TensorSize.plain(tensor, 2, 2), 2)
MODEL = (SIZES, model_work(SPEC, "none"))
CODECS = ("none", "int8", "int4")


def packed(codec):
    """The model in about as many bytes as a codec would take."""
    ratio = {"none": 1, "int8": 0.5, "int4": 0.28}[codec]
    sizes = model_sizes(SPEC, lambda tensor: TensorSize.plain(tensor, 2, 2), 2)
    layers = tuple(round(ratio * size) for size in sizes.layer_bytes[1:-1])
    ends = sizes.layer_bytes[0], sizes.layer_bytes[-1]
    return replace(sizes, layer_bytes=(ends[0], *layers, ends[1])), model_work(SPEC, codec)


CORES = Computer(
    products={
        form: Curve(rows=(1, 16, 64, 256, 1024), flops_per_s=(2e10, 2.2e11, 5.5e11, 7e11, 8e11))
        for form in ("bfloat16", "int8", "int4")
    },
    memory_bytes_per_s=2.5e10,
    touched_values_per_s=1e9,
    prompt_attention_flops_per_s=2e11,
    cache_bytes_per_s={1: 2e10},
    unpacked_bytes_per_s={"int8": 1e10, "int4": 1e10},
    sampled_values_per_s=1e9,
    visit_s=5e-4,
    piece_s=1e-4,
)
CARD = Computer(
    products={"bfloat16": Curve(rows=(1, 64, 512), flops_per_s=(2e11, 1e13, 2.1e13))},
    memory_bytes_per_s=2e11,
    touched_values_per_s=2e10,
    prompt_attention_flops_per_s=1e13,
    cache_bytes_per_s={1: 2e11},
    unpacked_bytes_per_s={"int8": 3e10, "int4": 3e10},
    sampled_values_per_s=2e10,
    visit_s=2e-4,
    piece_s=1e-4,
)


def machine_of(unified, addressable=True, **changed):
    link = Lane(bytes_per_s=1.2e10, copy_s=1e-5)
    values = {
        "name": "a machine",
        "about": "",
        "backend": "any",
        "dtypes": ("bfloat16",),
        "unified": unified,
        "addressable": addressable and unified,
        "page_tokens": 64,
        "device_bytes": 0,
        "host_bytes": 0,
        "disk_bytes": 0,
        "disk_read": Lane(bytes_per_s=3e9),
        "disk_write": Lane(bytes_per_s=1e9),
        "up": None if unified and addressable else link,
        "down": None if unified and addressable else link,
        "device": CORES if unified else CARD,
        "host": None if unified else CORES,
        "crossing_s": 0.0 if unified else 3e-4,
        "computing_share": 0.85,
        "reading_share": 0.9,
        **changed,
    }
    return Machine(**values)


def task_of(job, budgets, unified=True, model=MODEL, machine=None, **choice):
    own = Choice(**choice)
    models = dict.fromkeys(own.weight_codecs, model)
    if own.compress_weights == "auto":
        models = {codec: packed(codec) for codec in CODECS}
    return Task(
        models=models,
        job=job,
        machine=machine or machine_of(unified),
        dtype="bfloat16",
        budgets=budgets,
        choice=own,
    )


def pick(*args, **kwargs):
    return choose(task_of(*args, **kwargs)).policy


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
PLENTY = Budgets(device_bytes=10**13, host_bytes=10**13, disk_bytes=10**13)
TIGHT = Budgets(device_bytes=2500 * MIB, host_bytes=0, disk_bytes=100_000 * MIB)


# ---- what fits


@settings(max_examples=12)
@given(job=JOBS, budgets=BUDGETS, unified=st.booleans())
def test_the_chosen_policy_fits_or_there_is_a_refusal_that_says_what_would(job, budgets, unified):
    task = task_of(job, budgets, unified)
    try:
        policy = choose(task).policy
    except DoesNotFit as refusal:
        with pytest.raises(DoesNotFit, match=re.escape(str(refusal))):
            need_room(task)
        sizes = {
            f"{tier}_bytes": parse_bytes(size)
            for tier, size in re.findall(r"--(\w+)-memory is .*?takes ([^;]+)", str(refusal))
        }
        assert sizes
        enough = replace(task, budgets=replace(budgets, **sizes))
        policy = choose(enough).policy
        assert within(enough.needs(policy), enough.budgets)
    else:
        need_room(task)
        assert within(task.needs(policy), budgets)


@settings(max_examples=8)
@given(
    layers=st.integers(2, 40),
    layer_bytes=st.integers(10**5, 10**9),
    head_bytes=st.integers(10**5, 10**9),
    job=JOBS,
    budgets=BUDGETS,
    unified=st.booleans(),
)
def test_no_budget_is_exceeded_whatever_the_model(
    layers, layer_bytes, head_bytes, job, budgets, unified
):
    sizes, work = MODEL
    sizes = replace(
        sizes,
        layer_bytes=(head_bytes, *[layer_bytes] * layers, head_bytes),
        expert_bytes=(0,) * (layers + 2),
        caches=(replace(sizes.caches[0], num_layers=layers),),
        table_bytes=head_bytes // 2,
        projection_bytes=layers * layer_bytes // 4,
    )
    work = replace(
        work,
        order=(0,) * layers,
        layers=(replace(work.layers[0], num_layers=layers),),
    )
    task = task_of(job, budgets, unified, model=(sizes, work))
    try:
        policy = choose(task).policy
    except DoesNotFit:
        return

    assert within(task.needs(policy), budgets)


@settings(max_examples=12)
@given(
    job=JOBS,
    unified=st.booleans(),
    disk=st.sampled_from([0.0, 0.5, 1.0]),
    shape=st.sampled_from([(None, None), (2, 4), (16, None)]),
)
def test_budgets_of_what_was_chosen_are_no_refusal(job, unified, disk, shape):
    """Also where it is paced: such a block may take less than one that goes step by step."""
    batch_size, num_batches = shape
    split = Split(device=1 - disk, disk=disk)
    fixed = {"weights": split, "cache": split, "activations": split}
    task = task_of(job, PLENTY, unified, batch_size=batch_size, num_batches=num_batches, **fixed)
    needs = task.needs(choose(task).policy)

    tight = Budgets(
        device_bytes=needs.device_bytes, host_bytes=needs.host_bytes, disk_bytes=needs.disk_bytes
    )

    assert within(task.needs(choose(replace(task, budgets=tight)).policy), tight)


def test_a_policy_that_was_given_is_checked_tier_by_tier():
    task = task_of(JobSizes(prompt_tokens=100, new_tokens=20), PLENTY, False)
    needs = task.needs(Policy(cache=Split(device=0, disk=1)))
    budgets = Budgets(device_bytes=needs.device_bytes, host_bytes=needs.host_bytes, disk_bytes=MIB)

    with pytest.raises(DoesNotFit, match=r"--disk-memory is 1.00 MiB") as refusal:
        check(needs, Policy(), budgets)

    assert "--device-memory" not in str(refusal.value)


@settings(max_examples=30)
@given(job=JOBS, unified=st.booleans())
def test_what_fits_in_memory_stays_there(job, unified):
    policy = pick(job, PLENTY, unified)

    assert policy.weights == policy.cache == policy.activations == Split()


@settings(max_examples=10)
@given(job=JOBS, budgets=BUDGETS, addressable=st.booleans())
def test_where_memory_is_unified_nothing_is_homed_on_the_host_or_computed_there(
    job, budgets, addressable
):
    task = task_of(job, budgets, machine=machine_of(True, addressable))
    try:
        policy = choose(task).policy
    except DoesNotFit:
        return

    needs = task.needs(policy)
    assert policy.weights.host == policy.cache.host == policy.activations.host == 0
    assert not (policy.cpu_attention or policy.cpu_projections)
    assert within(needs, budgets)
    assert needs.device_bytes <= budgets.device_bytes + budgets.host_bytes


# ---- the best there is


def splits_of(step):
    """All splits whose shares are multiples of a step."""
    parts = round(1 / step)
    return [
        Split(device=device * step, host=host * step, disk=1 - (device + host) * step)
        for device in range(parts + 1)
        for host in range(parts + 1 - device)
    ]


GRID = [
    Split(device=each.device, host=each.host, disk=max(0.0, each.disk)) for each in splits_of(1 / 5)
]


@pytest.mark.parametrize("cpu_attention", [False, True])
@pytest.mark.parametrize("device_mib", [700, 1500, 3000])
@pytest.mark.parametrize("host_mib", [1500, 6000])
def test_the_linear_program_finds_what_trying_all_shares_finds(device_mib, host_mib, cpu_attention):
    """Of one shape: the best of a grid of 21 x 21 x 2 splits is no better, but for 0.5 %."""
    job = JobSizes(prompt_tokens=300, new_tokens=64, num_rows=128)
    budgets = Budgets(
        device_bytes=device_mib * MIB, host_bytes=host_mib * MIB, disk_bytes=100_000 * MIB
    )
    task = task_of(job, budgets, False)
    block = Policy(batch_size=16, num_batches=8, cpu_attention=cpu_attention)

    best = best_shares(block, task)

    tried = [
        task.planned(policy).tok_s
        for weights, cache in product(GRID, GRID)
        for activations in (Split(), Split(device=0, host=1))
        if task.fits(
            policy := replace(block, weights=weights, cache=cache, activations=activations)
        )
    ]
    assert best is not None
    assert tried
    assert task.fits(best.policy)
    assert best.tok_s >= 0.995 * max(tried)


SHAPES = [
    Policy(batch_size=batch_size, num_batches=num_batches)
    for batch_size, num_batches in product((4, 8, 16, 64, 128), (1, 2, 4, 8))
]


@pytest.mark.parametrize(
    ("unified", "num_rows", "prompt_tokens", "memory_mib"),
    [
        (True, None, 32, 700),
        (True, 300, 32, 2000),
        (True, 300, 800, 2000),
        (False, None, 800, 700),
        (False, 300, 32, 4500),
        (False, 300, 800, 2000),
    ],
)
def test_the_search_finds_what_trying_all_shapes_finds(
    unified, num_rows, prompt_tokens, memory_mib
):
    job = JobSizes(prompt_tokens=prompt_tokens, new_tokens=64, num_rows=num_rows)
    budgets = Budgets(
        device_bytes=memory_mib * MIB,
        host_bytes=0 if unified else 3 * memory_mib * MIB,
        disk_bytes=100_000 * MIB,
    )
    task = task_of(job, budgets, unified)

    best = choose(task)

    tried = []
    for shape, sweep_tokens, attends in product(SHAPES, (0, 128, 1024), (False, True)):
        if attends and unified:
            continue
        block = replace(shape, sweep_tokens=sweep_tokens, cpu_attention=attends)
        found = best_shares(block, task)
        if found is not None:
            tried.append(found)
    assert best.tok_s >= 0.99 * max(each.tok_s for each in tried)


@settings(max_examples=12)
@given(job=JOBS, budgets=BUDGETS, more=st.integers(0, 20_000 * MIB), unified=st.booleans())
def test_more_memory_never_predicts_less(job, budgets, more, unified):
    def predicted(found):
        try:
            return choose(task_of(job, found, unified)).tok_s
        except DoesNotFit:
            return 0.0

    larger = replace(budgets, device_bytes=budgets.device_bytes + more)

    assert predicted(larger) >= 0.99 * predicted(budgets)


@settings(max_examples=10)
@given(
    job=JOBS,
    budgets=BUDGETS,
    times=st.floats(1, 10),
    lane=st.sampled_from(["disk_read", "disk_write", "up", "down"]),
)
def test_a_quicker_lane_never_predicts_less(job, budgets, times, lane):
    slow = machine_of(False)
    own = getattr(slow, lane)
    quick = replace(slow, **{lane: replace(own, bytes_per_s=times * own.bytes_per_s)})
    try:
        rates = [choose(task_of(job, budgets, machine=machine)).tok_s for machine in (slow, quick)]
    except DoesNotFit:
        return

    assert rates[1] >= 0.99 * rates[0]


# ---- blocks


def test_what_was_fixed_is_obeyed():
    fixed = {
        "weights": Split(device=0.3, host=0.3, disk=0.4),
        "batch_size": 5,
        "num_batches": 3,
        "prefill_tokens": 77,
        "sweep_tokens": 123,
    }
    budgets = Budgets(device_bytes=20_000 * MIB, host_bytes=20_000 * MIB, disk_bytes=0)

    policy = pick(JobSizes(prompt_tokens=100, new_tokens=20), budgets, False, **fixed)

    assert {name: getattr(policy, name) for name in fixed} == fixed


def test_a_block_is_no_larger_than_the_job():
    policy = pick(JobSizes(prompt_tokens=10, new_tokens=10, num_rows=3), PLENTY)

    assert policy.block_size == 3


def test_short_prompts_pass_together_even_if_nothing_is_decoded():
    job = JobSizes(prompt_tokens=16, new_tokens=1, num_rows=64)

    policy = pick(job, PLENTY)

    # One row after another would read all weights for 16 tokens at a time.
    assert policy.block_size == job.num_rows


def test_blocks_of_a_job_that_is_known_come_out_even():
    """One of 300 rows as two of 150, not one of 256 and a small one after it."""
    job = JobSizes(prompt_tokens=500, new_tokens=64, num_rows=300)
    room = 190 * job.columns * SIZES.cache_token_bytes + 600 * MIB
    budgets = Budgets(device_bytes=room, host_bytes=0, disk_bytes=0)

    policy = pick(job, budgets, sweep_tokens=0, cache=Split())

    assert policy.block_size == 150


def test_prompts_are_paced_where_weights_stream_to_a_job_of_several_blocks():
    """Prefill is bound by compute and decode by the disk, so together they take the longer of both."""
    job = JobSizes(prompt_tokens=128, new_tokens=32, num_rows=500)
    tight = Budgets(device_bytes=1200 * MIB, host_bytes=0, disk_bytes=500_000 * MIB)
    ample = Budgets(device_bytes=20_000 * MIB, host_bytes=0, disk_bytes=500_000 * MIB)

    paced = choose(task_of(job, tight))

    lockstep = choose(task_of(job, tight, sweep_tokens=0))
    assert paced.policy.sweep_tokens > 0
    assert lockstep.policy.sweep_tokens == 0
    assert paced.tok_s > 1.1 * lockstep.tok_s
    assert pick(job, ample).sweep_tokens == 0


@pytest.mark.parametrize("unified", [True, False])
def test_a_budget_holds_more_rows_of_a_model_with_windows(unified):
    sizes, work = MODEL
    cache = sizes.caches[0]
    half = cache.num_layers // 2
    full, windowed = replace(cache, num_layers=half), replace(cache, num_layers=half, window=256)
    kind = replace(work.layers[0], num_layers=half)
    mixed = (
        replace(sizes, caches=(full, windowed)),
        replace(work, layers=(kind, replace(kind, window=256, caches=1)), order=(0, 1) * half),
    )
    job = JobSizes(prompt_tokens=1800, new_tokens=128)
    # The weights and 24 rows' whole cache.
    num_bytes = sizes.weight_bytes + 24 * job.columns * sizes.cache_token_bytes
    budgets = Budgets(device_bytes=num_bytes, host_bytes=400 * MIB, disk_bytes=0)

    whole, part = (choose(task_of(job, budgets, unified, model=each)) for each in (MODEL, mixed))

    assert part.policy.block_size >= 1.3 * whole.policy.block_size
    assert part.tok_s > whole.tok_s


# ---- the CPU beside the device

CACHE_AWAY = {"weights": Split(), "cache": Split(device=0, host=1)}


@pytest.mark.parametrize(("link_bytes_per_s", "on_cpu"), [(1e9, True), (1e12, False)])
def test_the_cpu_attends_where_the_link_is_what_holds_the_run_back(link_bytes_per_s, on_cpu):
    job = JobSizes(prompt_tokens=512, new_tokens=64, num_rows=64)
    link = Lane(bytes_per_s=link_bytes_per_s)
    machine = machine_of(False, up=link, down=link)

    policy = pick(job, PLENTY, machine=machine, **CACHE_AWAY)

    assert policy.cpu_attention is on_cpu


@pytest.mark.parametrize(("num_rows", "projects"), [(1, True), (256, False)])
def test_the_cpu_projects_for_few_rows_of_a_link_bound_job(num_rows, projects):
    job = JobSizes(prompt_tokens=16, new_tokens=64, num_rows=num_rows)
    cores = replace(CORES, products={"bfloat16": Curve(rows=(1, 64), flops_per_s=(4e10, 4e11))})
    link = Lane(bytes_per_s=1.2e10)
    machine = machine_of(False, host=cores, up=link, down=link, crossing_s=1e-5)

    policy = pick(
        job,
        PLENTY,
        machine=machine,
        weights=Split(device=0, host=1),
        cache=Split(),
        sweep_tokens=0,
    )

    assert policy.cpu_projections is projects


@pytest.mark.parametrize("asked", [True, False])
def test_what_was_asked_of_the_cpu_is_obeyed(asked):
    job = JobSizes(prompt_tokens=100, new_tokens=20)

    policy = pick(job, PLENTY, False, **CACHE_AWAY, cpu_attention=asked, cpu_projections=asked)

    assert (policy.cpu_attention, policy.cpu_projections) == (asked, asked)


# ---- codecs


@pytest.mark.parametrize("codec", CODECS)
@settings(max_examples=5)
@given(job=JOBS, budgets=BUDGETS, unified=st.booleans())
def test_a_cache_is_packed_if_that_was_asked_for_and_then_no_prompt_is_shared_out(
    codec, job, budgets, unified
):
    task = task_of(job, budgets, unified, compress_cache=codec)
    try:
        policy = choose(task).policy
    except DoesNotFit:
        return

    assert policy.compress_cache == codec
    assert codec == "none" or policy.sweep_tokens == 0
    assert within(task.needs(policy), budgets)


def test_a_packed_cache_has_room_for_more_rows():
    job = JobSizes(prompt_tokens=1000, new_tokens=64)
    budgets = Budgets(device_bytes=8000 * MIB, host_bytes=0, disk_bytes=0)
    resident = {"weights": Split(), "cache": Split(), "sweep_tokens": 0}

    rows = {
        codec: pick(job, budgets, compress_cache=codec, **resident).block_size for codec in CODECS
    }

    assert rows["int8"] > 1.3 * rows["none"]
    assert rows["int4"] > 1.3 * rows["int8"]


@pytest.mark.parametrize(("codec", "ratio"), [("int8", 9 / 16), ("int4", 4.5 / 16)])
def test_a_packed_cache_on_disk_is_predicted_to_move_its_own_bytes(codec, ratio):
    """Of long prompts the cache is all that counts, and its newest page is exact."""
    job = JobSizes(prompt_tokens=2000, new_tokens=200, num_rows=64)
    policy = Policy(cache=Split(device=0, disk=1), batch_size=64)
    task = task_of(job, PLENTY)

    plain, small = (
        task.planned(each).predicted.moved_bytes["disk_to_host"]
        for each in (policy, replace(policy, compress_cache=codec))
    )

    assert small / plain == pytest.approx(ratio, rel=0.02)


def test_nothing_is_compressed_unless_the_search_may():
    job = JobSizes(prompt_tokens=500, new_tokens=64)
    tight = Budgets(device_bytes=1500 * MIB, host_bytes=0, disk_bytes=100_000 * MIB)

    machine = machine_of(True, disk_read=Lane(bytes_per_s=5e8))

    exact = choose(task_of(job, tight, machine=machine))
    free = choose(
        task_of(job, tight, machine=machine, compress_weights="auto", compress_cache="auto")
    )
    roomy = choose(
        task_of(
            JobSizes(prompt_tokens=8, new_tokens=8, num_rows=1),
            PLENTY,
            machine=machine_of(False),
            compress_cache="auto",
        )
    )

    assert (exact.policy.compress_weights, exact.policy.compress_cache) == ("none", "none")
    assert free.policy.compress_weights != "none"
    assert free.tok_s > 1.2 * exact.tok_s
    assert roomy.policy.compress_cache == "none"
    for weights, cache in product(CODECS, CODECS):
        fixed = task_of(job, tight, machine=machine, compress_weights=weights, compress_cache=cache)
        fixed = replace(fixed, models={weights: packed(weights)})
        assert free.tok_s >= 0.99 * choose(fixed).tok_s


# ---- few values


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_few_values_are_predicted_to_cross_the_link_and_all_keys(share):
    """Of long prompts the cache is all that counts; its newest page moves whole."""
    job = JobSizes(prompt_tokens=2000, new_tokens=200, num_rows=64)
    policy = Policy(cache=Split(device=0, host=1), batch_size=64)
    task = task_of(job, PLENTY, False)

    whole, few = (
        task.planned(each).predicted.moved_bytes["host_to_device"]
        for each in (policy, replace(policy, attn_sparsity=share))
    )

    assert few / whole == pytest.approx((1 + share) / 2, rel=0.03)


def test_few_values_are_added_up_if_that_was_asked_for():
    job = JobSizes(prompt_tokens=500, new_tokens=64)

    policy = pick(job, TIGHT, attn_sparsity=0.1)

    assert policy.attn_sparsity == 0.1


# ---- latency


def test_a_block_takes_no_longer_than_it_may():
    job = JobSizes(prompt_tokens=300, new_tokens=64, num_rows=500)
    free = choose(task_of(job, TIGHT))

    for share in (0.5, 0.2):
        most_s = share * free.predicted.block_s
        bound = choose(task_of(job, TIGHT, max_latency_s=most_s))
        assert bound.predicted.block_s <= most_s
        assert bound.tok_s < free.tok_s


def test_a_latency_that_can_not_be_is_refused_with_the_least_that_can():
    job = JobSizes(prompt_tokens=300, new_tokens=64, num_rows=500)

    with pytest.raises(DoesNotFit, match=r"--max-latency 0\.001") as refusal:
        pick(job, TIGHT, max_latency_s=0.001)

    least_s = float(str(refusal.value).rpartition("is ")[2])
    best = choose(task_of(job, TIGHT, max_latency_s=least_s))
    assert 0.98 * least_s <= best.predicted.block_s <= least_s


def test_each_point_of_the_frontier_is_better_than_all_others_in_one_of_the_two():
    task = task_of(JobSizes(prompt_tokens=300, new_tokens=64, num_rows=500), TIGHT)

    points = frontier(task)

    assert len(points) >= 5
    for (latency_s, tok_s, policy), (later_s, faster, _) in pairwise(points):
        assert latency_s < later_s
        assert tok_s < faster
        assert task.fits(policy)
        assert task.planned(policy).predicted.block_s == pytest.approx(latency_s)
    assert points[-1][1] >= 0.998 * choose(task).tok_s
    middle_s = points[len(points) // 2][0]
    bound = replace(task, choice=replace(task.choice, max_latency_s=middle_s))
    assert choose(bound).tok_s <= 1.01 * max(each[1] for each in points if each[0] <= middle_s)


# ---- what more would bring


def test_what_more_would_bring_is_never_less_and_names_what_holds_the_run_back():
    task = task_of(JobSizes(prompt_tokens=300, new_tokens=64, num_rows=500), TIGHT)
    planned = choose(task)

    bought = {gain.what: gain.tok_s / planned.tok_s for gain in gains(task, planned)}

    assert set(bought) == {"device", "disk", "disk_to_host", "host_to_disk"}
    assert min(bought.values()) >= 1
    assert bought["device"] > 1.02
    assert bought["disk"] == pytest.approx(1, abs=0.01)


@settings(max_examples=5)
@given(job=JOBS, budgets=BUDGETS, unified=st.booleans())
def test_gains_are_of_the_plan_that_is_there(job, budgets, unified):
    task = task_of(job, budgets, unified)
    try:
        planned = choose(task)
    except DoesNotFit:
        assume(False)
        return

    bought = gains(task, planned)

    assert {gain.what for gain in bought} >= {"device", "disk", "disk_to_host", "host_to_disk"}
    assert all(gain.tok_s >= planned.tok_s for gain in bought)

"""What a visit costs: sums done by hand, on a machine of round numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from round_machine import CACHE, KIB, LAYER_BYTES, computer, costs_of, machine, model, work

from flexport.planner.costs import UNDER_WAY_BYTES, Prompts, Steps, Visit, VisitCost
from flexport.planner.footprint import JobSizes
from flexport.planner.machine import Curve, Lane
from flexport.planner.work import Matrices
from flexport.policy import Policy, Split
from flexport.store.store import CHUNK_BYTES, NUM_READERS

HOST, DISK = Split(device=0, host=1), Split(device=0, disk=1)
PROMPTS = Visit(prompts=(Prompts(rows=2, end=100),), sampled=2)
STEPS = Visit(steps=(Steps(rows=4, columns=117, decoded=17, last=32),), sampled=4)
COLUMN = 8 * KIB

PROMPTS_S = 8 + 200 * 70 / 700 + 2 + 2 * 5050 * 40 / 4e3
"""The visit itself, values touched, products at the last rate, and 5050 pairs of each of two rows."""

STEPS_S = 8 + 4 * 70 / 700 + 1 + 4 * 117 * COLUMN / (1024 * KIB)
"""The same: 4 rows are multiplied as fast as 1, and read 117 columns each."""


def test_what_is_at_home_on_the_device_moves_nothing():
    costs = costs_of(Policy())

    for visit, seconds in ((PROMPTS, PROMPTS_S), (STEPS, STEPS_S)):
        cost = costs.visit(1, visit)
        assert cost.compute_s == pytest.approx(seconds)
        assert (cost.moved_bytes, cost.host_s, cost.staged_bytes) == ({}, 0, 0)


def test_tokens_of_decode_steps_pass_at_a_rate_of_their_own():
    costs = costs_of(Policy(), machine=machine(device=computer(stepped_values_per_s=70)))

    assert costs.visit(1, PROMPTS).compute_s == pytest.approx(PROMPTS_S)
    more_s = 4 * 70 / 70 - 4 * 70 / 700
    assert costs.visit(1, STEPS).compute_s == pytest.approx(STEPS_S + more_s)


def test_further_pieces_cost_a_call_and_their_pages_too():
    costs = costs_of(
        Policy(), machine=machine(device=computer(piece_s=3, page_s=0.5), page_tokens=16)
    )
    visit = replace(STEPS, steps=STEPS.steps * 2)

    cost = costs.visit(1, visit)

    # A page of the prompt, one of 16 decoded columns, and one that is begun.
    beside_s = 8 + 3 + 2 * 3 * 0.5
    assert cost.compute_s == pytest.approx(beside_s + 2 * (STEPS_S - 8) - 1)


def test_kernels_of_an_asynchronous_device_run_while_further_ones_are_launched():
    ahead = machine(device=computer(asynchronous=True))
    steps = 4 * 70 / 700 + 1

    costs = costs_of(Policy(), machine=ahead)

    # Launches take 8 s: less than the work of prompts, and more than that of steps.
    assert costs.visit(1, PROMPTS).compute_s == pytest.approx(PROMPTS_S - 8)
    assert costs.visit(1, STEPS).compute_s == pytest.approx(STEPS_S - steps)
    assert costs.visit(4, PROMPTS).compute_s == pytest.approx(4 + 2 * 30 / 60)


def test_a_device_that_waits_for_the_cpus_projections_has_nothing_in_its_queue():
    device, policy = computer(asynchronous=True), Policy(weights=HOST, cpu_projections=True)
    ahead, behind = (
        costs_of(policy, machine=machine(device=each)) for each in (device, computer())
    )

    assert ahead.visit(1, STEPS).compute_s == behind.visit(1, STEPS).compute_s
    assert ahead.visit(1, PROMPTS).compute_s < behind.visit(1, PROMPTS).compute_s


def test_weights_on_disk_come_once_a_sweep_and_stay_until_it_has_passed():
    costs = costs_of(Policy(weights=DISK))

    first, later = costs.visit(1, PROMPTS), costs.visit(1, PROMPTS, first=False)

    assert first.moved_bytes == {"disk_to_host": LAYER_BYTES, "host_to_device": LAYER_BYTES}
    assert first.staged_bytes == first.layer_bytes == LAYER_BYTES
    assert costs.lane_s("disk_to_host", first) == 0.5 + 10
    assert costs.lane_s("host_to_device", first) == 1
    assert (later.moved_bytes, later.layer_bytes) == ({}, 0)


def test_tables_are_read_by_rows_and_never_come():
    costs = costs_of(Policy(weights=DISK))

    assert costs.visit(0, PROMPTS).moved_bytes == {}
    assert costs.visit(4, PROMPTS).moved_bytes["disk_to_host"] == LAYER_BYTES


def test_the_head_is_the_first_to_stay():
    costs = costs_of(Policy(weights=Split(device=0.5, host=0.25, disk=0.25)))

    cost = costs.visit(1, PROMPTS)

    # Of 2.5 layers the head has one; the other four have 3/8 of theirs, and half of the rest each.
    far = 5 / 8 * LAYER_BYTES
    assert cost.moved_bytes == {"disk_to_host": far / 2, "host_to_device": far}
    assert costs.visit(4, PROMPTS).moved_bytes == {}


def test_weights_that_have_come_are_multiplied_at_their_own_rate():
    slow = computer(streamed_products={"float16": Curve(rows=(1, 100), flops_per_s=(1e3, 1e5))})
    costs = costs_of(Policy(weights=HOST), machine=machine(device=slow))

    assert costs.visit(1, STEPS).compute_s == pytest.approx(STEPS_S + 1)


def test_the_head_is_multiplied_with_what_is_sampled():
    cost = costs_of(Policy()).visit(4, PROMPTS)

    # Half a visit, 500 values, and 30 logits of 2 rows.
    assert cost.compute_s == pytest.approx(4 + 0.5 + 2 * 30 / 60)
    assert costs_of(Policy()).visit(4, replace(PROMPTS, sampled=0)).compute_s == 0


def test_states_come_from_the_layer_before_and_go_to_the_one_after():
    costs = costs_of(Policy(activations=Split(device=0.5, host=0.2, disk=0.3)))

    both = costs.visit(2, PROMPTS).moved_bytes
    embedded, head = costs.visit(0, PROMPTS).moved_bytes, costs.visit(4, PROMPTS).moved_bytes

    # Ten bytes each of 200 tokens.
    assert both == pytest.approx(
        {"disk_to_host": 600, "host_to_device": 1000, "device_to_host": 1000, "host_to_disk": 600}
    )
    assert embedded == pytest.approx({"device_to_host": 1000, "host_to_disk": 600})
    assert head == pytest.approx({"disk_to_host": 600, "host_to_device": 1000})


def test_states_that_are_needed_at_once_are_waited_for_on_their_way_to_disk_and_back():
    costs = costs_of(Policy(activations=DISK))

    beside, alone = (costs.visit(1, replace(STEPS, alone=alone)) for alone in (False, True))

    assert alone.moved_bytes == beside.moved_bytes
    there_and_back_s = sum(
        lane.seconds(alone.moved_bytes["host_to_disk"])
        for lane in (costs.machine.disk_read, costs.machine.disk_write)
    )
    assert alone.compute_s - beside.compute_s == pytest.approx(there_and_back_s)


def test_rows_of_a_table_on_disk_are_waited_for_behind_what_streams():
    near, far = (costs_of(Policy(weights=split)).visit(0, STEPS) for split in (Split(), DISK))

    machine = costs_of(Policy()).machine
    rows_bytes = 4 * costs_of(Policy()).model.hidden_token_bytes
    # What streams is smaller than what the store's readers could be at.
    before_bytes = max(costs_of(Policy()).model.layer_bytes)
    waited_s = machine.disk_read.seconds(rows_bytes + before_bytes)
    assert far.compute_s - near.compute_s == pytest.approx(waited_s)


def test_what_is_under_way_is_what_the_stores_readers_have():
    assert UNDER_WAY_BYTES == NUM_READERS * CHUNK_BYTES


def test_a_cache_on_the_host_crosses_in_pages_and_the_newest_one_both_ways():
    costs = costs_of(Policy(cache=HOST))

    step = costs.visit(1, replace(STEPS, steps=(replace(STEPS.steps[0], decoded=18, columns=118),)))
    prompts = costs.visit(1, PROMPTS)

    # 116 columns that are complete, and 16 of which two are filled.
    assert step.moved_bytes == {
        "host_to_device": 4 * 132 * COLUMN,
        "device_to_host": 4 * 16 * COLUMN,
    }
    assert step.staged_bytes == 4 * 132 * COLUMN
    assert prompts.moved_bytes == {"device_to_host": 200 * COLUMN}


def test_a_cache_on_disk_has_its_newest_page_in_memory():
    costs = costs_of(Policy(cache=DISK))

    def moved(decoded):
        step = replace(STEPS.steps[0], columns=100 + decoded, decoded=decoded)
        return costs.visit(1, replace(STEPS, steps=(step,))).moved_bytes

    assert moved(18) == {
        "disk_to_host": 4 * 116 * COLUMN,
        "host_to_device": 4 * 132 * COLUMN,
        "device_to_host": 4 * 16 * COLUMN,
    }
    assert moved(16)["host_to_disk"] == 4 * 16 * COLUMN
    assert "host_to_disk" not in moved(32)


def test_where_memory_is_one_only_what_is_on_disk_moves():
    for split, moved in ((HOST, {}), (DISK, {"disk_to_host": 4 * 116 * COLUMN})):
        costs = costs_of(Policy(cache=split), machine=machine(unified=True))
        assert costs.visit(1, STEPS).moved_bytes == moved


def test_a_typical_step_moves_the_mean_of_all_steps():
    costs = costs_of(Policy(cache=DISK))
    typical = Visit(steps=(Steps(rows=4, columns=116.5, decoded=16.5),))
    whole = VisitCost()
    for step in range(1, 33):
        steps = (Steps(rows=4, columns=100 + step, decoded=step, last=32),)
        whole.add(costs.visit(1, Visit(steps=steps)))

    mean = VisitCost()
    mean.add(costs.visit(1, typical), 32)

    assert mean.moved_bytes == pytest.approx(whole.moved_bytes)
    assert mean.compute_s == pytest.approx(whole.compute_s)


def test_rows_that_have_ended_lie_in_their_pages_until_these_are_written_anew():
    costs = costs_of(Policy(cache=DISK))
    step = replace(STEPS.steps[0], rows=1, held_rows=4)

    held = costs.visit(1, replace(STEPS, steps=(step,))).moved_bytes
    shed = costs.visit(1, replace(STEPS, steps=(replace(step, sheds=True),))).moved_bytes

    assert held == costs.visit(1, STEPS).moved_bytes
    assert shed["disk_to_host"] == held["disk_to_host"]
    assert shed["host_to_disk"] == 116 * COLUMN
    assert shed["device_to_host"] == 132 * COLUMN


def test_a_packed_cache_is_moved_packed_and_unpacked_to_be_read():
    costs = costs_of(Policy(cache=HOST, compress_cache="int8"))
    two_groups = 2 * 280 * KIB

    step, prompts = costs.visit(1, STEPS), costs.visit(1, PROMPTS)

    # Two groups of the prompt; the newest page holds the 32 columns of the last one, exact.
    assert step.moved_bytes == {
        "host_to_device": 4 * (two_groups + 32 * COLUMN),
        "device_to_host": 4 * 32 * COLUMN,
    }
    assert step.compute_s == pytest.approx(STEPS_S + 4 * 117 * COLUMN / (512 * KIB))
    assert prompts.moved_bytes == {"device_to_host": 2 * two_groups}
    assert prompts.compute_s == pytest.approx(PROMPTS_S + 200 * COLUMN / (256 * KIB))


def test_a_window_bounds_what_is_seen():
    windowed = {"model": model(caches=(replace(CACHE, window=32),)), "work": work(window=32)}
    costs = costs_of(Policy(cache=HOST), **windowed)

    step, prompts = costs.visit(1, STEPS), costs.visit(1, PROMPTS)

    assert step.compute_s == pytest.approx(STEPS_S - 4 * (117 - 32) * COLUMN / (1024 * KIB))
    # The last 31 columns of each prompt stay; its queries see 528 pairs, and 68 times 32.
    assert prompts.moved_bytes == {"device_to_host": 2 * 31 * COLUMN}
    pairs = 32 * 33 / 2 + 68 * 32
    assert prompts.compute_s == pytest.approx(PROMPTS_S - 2 * (5050 - pairs) * 40 / 4e3)


def test_chunks_see_what_was_before_them():
    costs = costs_of(Policy(cache=HOST, prefill_tokens=50))
    chunks = [Visit(prompts=(Prompts(rows=1, begin=begin, end=begin + 50),)) for begin in (0, 50)]

    first, second = (costs.visit(1, chunk) for chunk in chunks)

    # The prompt's page has room for all 100 columns, and goes home twice.
    assert first.moved_bytes == {"device_to_host": 100 * COLUMN}
    assert second.moved_bytes == {"host_to_device": 100 * COLUMN, "device_to_host": 100 * COLUMN}
    beside_s = 2 * (8 + 50 * 70 / 700 + 1)
    assert first.compute_s + second.compute_s == pytest.approx(beside_s + 5050 * 40 / 4e3)


def test_nothing_is_stored_that_nobody_will_ask_for():
    costs = costs_of(Policy(cache=HOST), job=JobSizes(prompt_tokens=100, new_tokens=1))
    chunk = Visit(prompts=(Prompts(rows=1, end=50),))

    assert costs.visit(1, PROMPTS).moved_bytes == {}
    assert costs.visit(1, chunk).moved_bytes == {"device_to_host": 100 * COLUMN}


def test_the_cpu_attends_to_what_is_not_on_the_device_while_this_has_its_own_to_do():
    costs = costs_of(Policy(cache=Split(device=0.25, host=0.75), cpu_attention=True))

    cost = costs.visit(1, STEPS)

    # Three rows at half the rate, and the crossing; the device has one row.
    host_s = 3 * 117 * COLUMN / (512 * KIB) + 0.25
    assert cost.host_s == pytest.approx(host_s)
    assert cost.compute_s == pytest.approx(8 + 4 * 70 / 700 + 1 + host_s)
    # Queries of 3000 bytes, and a key and a value; results of 3000.
    assert cost.moved_bytes == {"device_to_host": 3 * (3000 + COLUMN), "host_to_device": 3 * 3000}


def test_what_the_cpu_attends_to_comes_from_disk_as_far_as_the_host():
    costs = costs_of(Policy(cache=DISK, cpu_attention=True))

    moved = costs.visit(1, STEPS).moved_bytes

    assert moved["disk_to_host"] == 4 * 116 * COLUMN
    assert moved["host_to_device"] == 4 * 3000


def test_the_cpu_multiplies_with_projections_where_they_are():
    cpu = computer(products={"float16": Curve(rows=(1, 100), flops_per_s=(1e3, 1e5))})
    costs = costs_of(Policy(weights=HOST, cpu_projections=True), machine=machine(host=cpu))

    cost, prompts = costs.visit(1, STEPS), costs.visit(1, PROMPTS)

    # 300 KiB stay; 300 values take 0.6 s there and 0.3 s on the device, which waits.
    results = 3000 + COLUMN
    assert cost.moved_bytes == {
        "host_to_device": LAYER_BYTES - 300 * KIB + 4 * results,
        "device_to_host": 4 * 10,
    }
    assert cost.host_s == pytest.approx(0.6)
    assert cost.compute_s == pytest.approx(STEPS_S + 0.6 - 0.3 + 0.25)
    assert prompts.moved_bytes == {"host_to_device": LAYER_BYTES}


def test_experts_come_if_they_are_picked_and_share_the_tokens():
    experts_bytes = 800 * KIB
    costs = costs_of(
        Policy(weights=DISK),
        model=model(
            expert_bytes=(0, experts_bytes, experts_bytes, experts_bytes, 0),
            one_expert_bytes=experts_bytes // 8,
            experts_picked=0.25,
        ),
        work=work(expert=Matrices(plain_values=400), num_experts=8, top_k=2),
    )
    one = Visit(steps=(Steps(rows=1, columns=117, decoded=17, last=32),))

    single, many = costs.visit(1, one), costs.visit(1, PROMPTS)

    # One token picks two of eight: 200 KiB of 800 come, and two products of one row.
    assert single.moved_bytes["disk_to_host"] == LAYER_BYTES - experts_bytes * 0.75
    own_s = 8 + 70 / 700 + 1 + 117 * COLUMN / (1024 * KIB)
    assert single.compute_s == pytest.approx(own_s + 2 * 0.4)
    # Of 200 tokens every expert gets 50, which take as long as one.
    assert many.moved_bytes["disk_to_host"] == pytest.approx(LAYER_BYTES)
    assert many.compute_s == pytest.approx(PROMPTS_S + 8 * 0.4)


def test_packed_weights_are_decoded_once_a_sweep_unless_they_are_multiplied_as_they_are():
    packed = work(dense=Matrices(packed_values=1000), codec="int8")
    device = computer(
        products={
            "float16": Curve(rows=(1, 100), flops_per_s=(2e3, 2e5)),
            "int8": Curve(rows=(1, 100), flops_per_s=(4e3, 4e5)),
        },
        decoded_values_per_s={"int8": 250.0},
        direct_rows={"int8": 16},
    )
    costs = costs_of(Policy(), work=packed, machine=machine(device=device))

    assert costs.visit(1, PROMPTS).compute_s == pytest.approx(PROMPTS_S + 4)
    assert costs.visit(1, PROMPTS, first=False).compute_s == pytest.approx(PROMPTS_S)
    assert costs.visit(1, STEPS).compute_s == pytest.approx(STEPS_S - 0.5)


def test_a_sweep_takes_as_long_as_its_busiest_lane():
    costs = costs_of(Policy())
    cost = VisitCost(compute_s=3.0)
    cost.move("disk_to_host", 100 * KIB, 2)

    assert costs.sweep_s(cost) == 3
    cost.move("disk_to_host", 200 * KIB, 2)
    assert costs.sweep_s(cost) == 3 + 4 * 0.5
    cost.move("device_to_host", 5000 * KIB)
    assert costs.sweep_s(cost) == 10


def test_computing_and_reading_leave_each_other_a_share():
    both = machine(computing_share=0.5, reading_share=0.8, disk_read=Lane(bytes_per_s=KIB))
    costs = costs_of(Policy(), machine=both)
    cost = VisitCost(compute_s=3.0)
    cost.move("disk_to_host", 4 * KIB)

    # 4 s of reading take 5 at 0.8, in which 2.5 of the 3 s are computed; the rest goes alone.
    assert costs.sweep_s(cost) == pytest.approx(5 + 0.5)


def test_loading_reads_what_stays_and_lays_it_out():
    laid_out = machine(device=computer(laid_out_values_per_s=350.0))

    stays = costs_of(Policy(), machine=laid_out)
    streams = costs_of(Policy(weights=DISK), machine=laid_out)

    assert stays.load_s == pytest.approx(5 * 0.5 + 50 + 3500 / 350)
    assert streams.load_s == 0

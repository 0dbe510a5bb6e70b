"""A machine's numbers: rates between what was measured, and files that say what is wrong with them."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from round_machine import computer, machine

from flexport.errors import UsageError
from flexport.planner.machine import Curve, Lane, machine_from_dict, read_machine

CURVES = st.lists(
    st.tuples(st.integers(1, 5000), st.floats(1e3, 1e15)),
    min_size=1,
    max_size=6,
    unique_by=lambda point: point[0],
).map(
    lambda points: Curve(
        rows=tuple(rows for rows, _ in sorted(points)),
        flops_per_s=tuple(rate for _, rate in sorted(points)),
    )
)


def test_a_copy_costs_its_bytes_and_something_for_itself():
    lane = Lane(bytes_per_s=100, copy_s=2)

    assert lane.seconds(500) == 7
    assert lane.seconds(500, num_copies=3) == 11
    assert lane.seconds(0, num_copies=3) == 0


@given(curve=CURVES)
def test_a_product_takes_what_was_measured_at_the_rows_that_were(curve):
    for rows, rate in zip(curve.rows, curve.flops_per_s, strict=True):
        assert curve.seconds(rows, 1000) == pytest.approx(2 * rows * 1000 / rate)


@given(curve=CURVES, share=st.floats(0, 1))
def test_between_two_measured_rows_time_is_on_the_line(curve, share):
    for low, high in zip(curve.rows, curve.rows[1:], strict=False):
        rows = low + share * (high - low)
        expected = (1 - share) * curve.seconds(low, 10) + share * curve.seconds(high, 10)

        assert curve.seconds(rows, 10) == pytest.approx(expected)


def test_fewer_rows_than_were_measured_take_as_long_and_more_go_on_at_the_last_rate():
    curve = Curve(rows=(4, 16), flops_per_s=(8.0, 16.0))

    assert curve.seconds(1, 10) == curve.seconds(4, 10) == 10
    assert curve.seconds(32, 10) == 40
    assert curve.seconds(0, 10) == 0


@pytest.mark.parametrize(
    ("rows", "rates"),
    [((), ()), ((1,), (1.0, 2.0)), ((0,), (1.0,)), ((1,), (0.0,)), ((2, 1), (1.0, 1.0)), ((1, 1), (1.0, 1.0))],
)  # fmt: skip
def test_a_curve_that_is_none_is_refused(rows, rates):
    with pytest.raises(UsageError, match="rising rows and a rate"):
        Curve(rows=rows, flops_per_s=rates)


def test_weights_that_have_come_are_multiplied_at_a_rate_of_their_own_if_there_is_one():
    slow = Curve(rows=(1,), flops_per_s=(1.0,))
    fast = Curve(rows=(1,), flops_per_s=(4.0,))
    one = computer(products={"float16": fast})
    two = replace(one, streamed_products={"float16": slow})

    assert one.product_s("float16", 1, 2, streamed=True) == 1
    assert two.product_s("float16", 1, 2, streamed=True) == 4
    assert two.product_s("float16", 1, 2, streamed=False) == 1


def test_a_form_that_was_not_measured_is_refused_with_those_that_were():
    with pytest.raises(UsageError, match=r"in int3; it has float16"):
        computer().product_s("int3", 1, 2, streamed=False)


def test_weights_are_decoded_at_memorys_rate_where_no_other_is_known():
    assert computer(memory_bytes_per_s=400).decode_s("int4", 1000) == 10
    assert computer(decoded_values_per_s={"int4": 50}).decode_s("int4", 1000) == 20


def test_more_queries_a_head_than_were_measured_read_the_keys_as_often():
    reads = computer(cache_bytes_per_s={1: 100.0, 4: 80.0})

    assert reads.cache_read_s(1, 1000) == 10
    assert reads.cache_read_s(2, 1000) == 20
    assert reads.cache_read_s(4, 1000) == 12.5
    assert reads.cache_read_s(8, 1000) == 25


@pytest.mark.parametrize("unified", [False, True])
def test_a_machine_comes_back_from_its_file(unified, tmp_path):
    there = machine(unified=unified, identity={"processor": "x"})
    file = tmp_path / "machine.json"

    file.write_text(there.to_json(), encoding="utf-8")

    assert read_machine(file) == there
    assert there.device.laid_out_values_per_s == math.inf


def changed(**fields):
    return {**machine().to_dict(), **fields}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "not a machine file of format 2: 'list'"),
        (changed(format=0), "not a machine file of format 2: 0; run `flexport profile`"),
        (changed(speed=1), r"machine has no field \['speed'\]; it has"),
        (changed(disk_read={"bytes_per_s": 0}), "disk_read.bytes_per_s is a rate"),
        (changed(disk_read={"bytes_per_s": "fast"}), "must be a number >= 0, got 'fast'"),
        (changed(disk_read={}), "disk_read: .*bytes_per_s"),
        (changed(disk_read=7), "disk_read is 7, not an object"),
        (changed(device_bytes=-1), "device_bytes must be a number >= 0, got -1"),
        (changed(device_bytes=True), "device_bytes must be a number >= 0, got True"),
        (changed(unified="no"), "machine.unified must be true or false, got 'no'"),
        (
            changed(device={**machine().to_dict()["device"], "asynchronous": 1}),
            "device.asynchronous must be true or false, got 1",
        ),
        (changed(host=None), "a CPU beside the device .* is for memory that is not unified"),
        (changed(up=None), "up and down may be null where the device's memory is addressable"),
        (changed(sources={"": "hearsay"}), r"a source is one of .*, not \['hearsay'\]"),
        (changed(crossing_s=float("nan")), "crossing_s must be a number >= 0, got nan"),
    ],
)
def test_a_file_that_holds_no_machine_is_refused_with_what_is_wrong(data, message):
    with pytest.raises(UsageError, match=message):
        machine_from_dict(data)


def test_a_curve_of_a_file_is_named_when_it_is_none():
    data = json.loads(machine().to_json())
    data["device"]["products"]["float16"] = {"rows": [1, 2], "rates": [3, 4]}

    with pytest.raises(UsageError, match=r"device.products.float16 has no field \['rates'\]"):
        machine_from_dict(data)


def test_a_file_that_is_none_is_refused_by_its_name(tmp_path):
    file = tmp_path / "machine.json"
    with pytest.raises(UsageError, match=r"can't read the machine file .*machine.json"):
        read_machine(file)

    file.write_text("{", encoding="utf-8")

    with pytest.raises(UsageError, match=r"machine.json is not JSON"):
        read_machine(file)


def test_a_machine_is_measured_when_all_its_numbers_are():
    told = {"": "measured", "disk_read": "datasheet: a drive's"}

    assert not machine(sources={}).is_measured
    assert machine(sources={"": "measured"}).is_measured
    assert not machine(sources=told).is_measured
    assert machine(sources=told).source_of("disk_read") == "datasheet: a drive's"
    assert machine(sources=told).source_of("up") == "measured"
    assert machine(sources={}).source_of("up") == "estimated"

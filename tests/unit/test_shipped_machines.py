"""Machines that come with flexport, and which of them stands in for one that was not measured."""

from __future__ import annotations

import pytest

from flexport.backend import Capabilities
from flexport.errors import UsageError
from flexport.planner.machine import machine_from_dict
from flexport.planner.shipped import like, shipped, shipped_names

GIB = 1 << 30


def facts(name, *, unified=False, addressable=False, dtypes=("float16", "float32")):
    return Capabilities(
        name=name,
        memory_bytes=7 * GIB,
        unified=unified,
        dtypes=dtypes,
        dtype_reason="",
        page_tokens=32,
        addressable=addressable,
    )


@pytest.mark.parametrize("name", shipped_names())
def test_a_shipped_machine_is_a_valid_file_and_says_where_its_numbers_come_from(name):
    machine = shipped(name)

    assert machine.name == name
    assert machine_from_dict(machine.to_dict()) == machine
    assert set(machine.dtypes) <= set(machine.device.products)
    assert "device.products" in machine.sources or machine.is_measured
    for field in ("disk_read", "device.products", "device.memory_bytes_per_s"):
        kind = machine.source_of(field)
        assert kind.startswith("measured") or ":" in kind, f"{field} says no more than {kind}"
    if machine.host is not None:
        assert set(machine.dtypes) <= set(machine.host.products)


def test_the_machines_people_ask_for_are_there():
    assert {"t4", "rtx3090", "h100", "m1-16gb", "m4-max", "cpu-2-core"} <= set(shipped_names())


def test_the_t4_is_the_paper_s():
    machine = shipped("t4")

    assert machine.disk_read.bytes_per_s == 2.8e9
    assert machine.source_of("disk_read").startswith("paper")
    assert machine.up is not None
    assert machine.up.bytes_per_s == 12e9
    assert machine.host_bytes <= 208e9


def test_a_name_that_there_is_not_is_refused_with_those_that_there_are():
    with pytest.raises(UsageError, match=r"abacus.*t4"):
        shipped("abacus")


@pytest.mark.parametrize(
    ("backend", "device", "expected"),
    [
        ("cuda", "Tesla T4", "t4"),
        ("cuda", "NVIDIA GeForce RTX 3090", "rtx3090"),
        ("cuda", "NVIDIA H100 80GB HBM3", "h100"),
        ("cuda", "NVIDIA H1000 8GB", "t4"),
        ("cuda", "NVIDIA A100-SXM4-80GB", "t4"),
        ("stranger", "a card", "t4"),
    ],
)
def test_a_card_is_like_the_one_of_its_name_or_else_the_slowest(backend, device, expected):
    assert like(backend, facts(device)).name == expected


@pytest.mark.parametrize(
    ("device", "expected"),
    [("Apple M4 Max", "m4-max"), ("Apple M1", "m1-16gb"), ("mps", "m1-16gb")],
)
def test_a_mac_is_like_a_mac(device, expected):
    assert like("mps", facts(device, unified=True)).name == expected


def test_a_processor_is_like_a_processor():
    found = like("cpu", facts("cpu (a toaster)", unified=True, addressable=True))

    assert found.name == "cpu-2-core"


def test_what_a_device_says_of_itself_is_kept_and_nothing_counts_as_measured():
    dtypes = ("bfloat16", "float32")

    found = like("cpu", facts("cpu (x)", unified=True, addressable=True, dtypes=dtypes))

    assert found.device_bytes == 7 * GIB
    assert found.page_tokens == 32
    assert found.dtypes == dtypes
    assert not found.is_measured
    assert found.identity == {}
    assert "not measured" in found.about


def test_a_dtype_that_the_like_has_not_is_as_fast_as_the_one_of_its_size():
    found = like("cuda", facts("Tesla T4", dtypes=("bfloat16", "float16", "float32")))

    assert found.device.products["bfloat16"] == found.device.products["float16"]
    assert found.device.products["bfloat16"] != found.device.products["float32"]

"""Profiling finds the rates that a device was given, and fills all of the record."""

from __future__ import annotations

import pytest
from torch.utils import backend_registration

from flexport.bench.profile import visits
from flexport.bench.profile.kernels import products
from flexport.bench.profile.lanes import link_lanes
from flexport.bench.profile.measure import measure_machine
from flexport.bench.profile.timing import Effort
from flexport.planner.machine import machine_from_dict

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

HASTE = Effort(
    memory_bytes=16 << 20,
    disk_bytes=4 << 20,
    kernel_s=0.001,
    disk_s=0.004,
    rounds=1,
    decode_steps=2,
)


@pytest.fixture
def emulated():
    """emulated(**rates): the device, closed at the end."""
    from flexport_emulated.backend import EmulatedBackend

    opened = []

    def get(**options):
        opened.append(EmulatedBackend(**options))
        return opened[-1]

    yield get
    for backend in opened:
        backend.close()


def test_links_are_found_with_their_rates_and_their_latency(emulated):
    backend = emulated(link_bytes_per_s=1e8, link_latency_s=0.02)

    (up, _), (down, _) = link_lanes(backend, Effort(memory_bytes=32 << 20, kernel_s=0.2, rounds=3))

    for lane in (up, down):
        assert lane.bytes_per_s == pytest.approx(1e8, rel=0.25)
        assert lane.copy_s == pytest.approx(0.02, rel=0.25)


def test_products_are_found_with_their_rate(emulated):
    backend = emulated(flops_per_s=1e9)

    found = products(backend, "float32", Effort(memory_bytes=8 << 20, kernel_s=0.1, rounds=3))

    assert found.resident == found.streamed
    assert max(found.resident.flops_per_s) == pytest.approx(1e9, rel=0.25)


def test_a_device_with_memory_of_its_own_has_links_and_a_cpu_beside_it(
    emulated, tmp_path, monkeypatch
):
    monkeypatch.setattr(visits, "MANY_PIECES", 2)
    backend = emulated(link_bytes_per_s=1e9)

    machine = measure_machine("emulated", backend, tmp_path, HASTE)

    assert machine_from_dict(machine.to_dict()) == machine
    assert not machine.unified
    assert machine.up is not None
    assert machine.down is not None
    assert machine.host is not None
    assert set(machine.dtypes) <= set(machine.host.products)
    assert machine.host_bytes > 0
    assert machine.device_bytes == backend.capabilities.memory_bytes
    assert machine.crossing_s > 0
    assert machine.device.asynchronous
    assert not machine.host.asynchronous
    assert list(tmp_path.iterdir()) == []

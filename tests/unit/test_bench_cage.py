"""Processes under a memory cap."""

from __future__ import annotations

import sys

import pytest

from flexport.bench.cage import drop_cached, open_cage, run_caged

TAKE = "import sys; x = bytearray(int(sys.argv[1])); x[::4096] = x[::4096]; print('took it')"


def run(num_bytes, cap_bytes):
    return run_caged([sys.executable, "-c", TAKE, str(num_bytes)], cap_bytes, timeout_s=60)


def needs_a_cage():
    with open_cage(100 << 20) as cage:
        if cage.enforced_by.startswith("nothing"):
            pytest.skip("this user may make no memory cgroup here")


def test_a_process_without_a_cap_runs_and_is_heard():
    ran = run(1 << 20, None)

    assert (ran.exit_code, ran.output) == (0, "took it\n")
    assert ran.cage_peak_bytes is None


def test_a_process_within_its_cap_runs_and_its_peak_counts():
    needs_a_cage()

    ran = run(30 << 20, 200 << 20)

    assert (ran.exit_code, ran.output) == (0, "took it\n")
    if ran.cage_peak_bytes is not None:  # systemd may take its group away too soon to ask
        assert 30 << 20 <= ran.cage_peak_bytes <= 200 << 20


def test_a_process_beyond_its_cap_is_killed():
    needs_a_cage()

    ran = run(400 << 20, 100 << 20)

    assert ran.exit_code in (-9, 137)
    assert ran.output == ""


def test_a_process_that_takes_too_long_is_killed():
    endless = [sys.executable, "-c", "while True: pass"]

    assert run_caged(endless, None, timeout_s=0.2).exit_code != 0


def test_an_exit_code_is_handed_on():
    assert run_caged([sys.executable, "-c", "raise SystemExit(3)"], None, 60).exit_code == 3


def test_a_file_dropped_from_the_cache_keeps_its_bytes(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 5000)

    drop_cached(path)

    assert path.read_bytes() == b"abc" * 5000

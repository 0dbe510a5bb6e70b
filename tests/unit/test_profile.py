"""Lines through measurements, the machine that they make, and when it is used again."""

from __future__ import annotations

import json
import time
from contextlib import closing
from dataclasses import replace

import pytest

from flexport.bench.profile import timing
from flexport.bench.profile.measure import measure_machine
from flexport.bench.profile.timing import Effort, fit_lane, fit_line, seconds_of
from flexport.cli.main import main
from flexport.engine import known_machine as known
from flexport.models import spec_of
from flexport.models.tensors import touched_values
from flexport.planner.machine import machine_from_dict, read_machine
from flexport.planner.shipped import shipped
from flexport.registry import open_backend

HASTE = Effort(
    memory_bytes=16 << 20,
    disk_bytes=4 << 20,
    kernel_s=0.001,
    disk_s=0.004,
    rounds=1,
    decode_steps=2,
)

# ---- lines


def test_a_lane_is_found_again_from_what_its_copies_take():
    sizes = (1 << 18, 1 << 21, 1 << 24)

    lane = fit_lane([(size, 2e-3 + size / 5e9) for size in sizes])

    assert lane.bytes_per_s == pytest.approx(5e9)
    assert lane.copy_s == pytest.approx(2e-3)


def test_a_small_size_counts_as_much_as_a_large_one():
    # Of y = 1 + x / 1000; that the middle one is 20 % off would lift a fit of plain seconds by 0.4.
    points = [(1.0, 1.001), (5_000.0, 7.2), (10_000.0, 11.0)]

    line = fit_line(points)

    assert line.start == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    "points",
    [[(1.0, 1.0), (2.0, 2.5)], [(1.0, 2.0), (2.0, 1.0)]],
    ids=["starts below 0", "falls"],
)
def test_no_line_gives_a_time_below_0(points):
    line = fit_line(points)

    assert line.start >= 0
    assert line.slope >= 0
    assert line.start + line.slope > 0


def test_sizes_that_take_the_same_are_a_copy_s_cost():
    lane = fit_lane([(1000, 1.0), (2000, 1.0)])

    assert lane.copy_s == pytest.approx(1.0)
    assert lane.bytes_per_s == pytest.approx(2000)


def test_a_round_ends_when_the_device_is_done():
    class Slow:
        def sync(self) -> None:
            time.sleep(0.01)

    spread = seconds_of(Slow(), lambda: None, 0.001, rounds=3)  # type: ignore[arg-type]

    assert spread.median >= 0.01


# ---- touched values


def llama(**fields):
    config = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 32,
    }  # fmt: skip
    return spec_of({**config, **fields})


def test_touched_values_of_a_plain_layer_are_counted_by_hand():
    norms_and_sums = 2 * 32 + 2 * 32
    turns = 32 + 16
    attended_and_new = 32 + 2 * 16
    gate_and_up = 2 * 48

    found = touched_values(llama(), 1)

    assert found == norms_and_sums + turns + attended_and_new + gate_and_up


def test_a_wider_mlp_is_touched_more_and_the_embedding_is_not():
    narrow, wide = llama(), llama(intermediate_size=96)

    assert touched_values(wide, 1) - touched_values(narrow, 1) == 2 * 48
    assert touched_values(wide, 0) == touched_values(narrow, 0) == 32
    assert touched_values(wide, 2) == 32


@pytest.mark.parametrize(
    "model",
    ["facebook/opt-1.3b", "mistralai/Mixtral-8x7B-v0.1", "deepseek-ai/DeepSeek-V3"],
)
def test_every_kind_of_layer_is_touched(model):
    from flexport.models.shapes import known_config

    config = known_config(model)
    assert config is not None
    spec = spec_of(config)

    for layer in range(spec.num_schedule_layers):
        assert touched_values(spec, layer) >= (0 if layer == spec.head_layer else spec.hidden_size)


# ---- the machine


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The CPU of the machine that tests run on, in haste."""
    directory = tmp_path_factory.mktemp("disk")
    _, backend = open_backend("cpu")
    with closing(backend):
        machine = measure_machine("cpu", backend, directory, HASTE)
    assert list(directory.iterdir()) == [], "something was left behind"
    return machine, directory


def test_a_measured_machine_is_a_valid_record_that_survives_its_file(measured):
    machine, _ = measured

    again = machine_from_dict(json.loads(machine.to_json()))

    assert again == machine
    assert machine.is_measured
    assert machine.backend == "cpu"
    assert machine.host is None
    assert machine.up is None
    device = machine.device
    assert set(machine.dtypes) <= set(device.products) == set(device.streamed_products)
    assert set(device.decoded_values_per_s) == {"int8", "int4"}
    assert set(device.cache_bytes_per_s) == {1, 2, 4, 8}
    assert 0 < machine.computing_share <= 1
    assert 0 < machine.reading_share <= 1


def test_rows_that_the_backend_multiplies_packed_are_those_it_says(measured):
    import torch

    machine, _ = measured
    _, backend = open_backend("cpu")
    with closing(backend):
        dtype = getattr(torch, machine.dtypes[0])
        for codec, most in machine.device.direct_rows.items():
            assert backend.multiplies(codec, dtype, most)  # type: ignore[attr-defined]
            assert most == 1 << 20 or not backend.multiplies(codec, dtype, most + 1)  # type: ignore[attr-defined]


def test_a_machine_is_known_while_nothing_of_it_changes(measured, tmp_path, monkeypatch):
    machine, directory = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path))
    assert known.known_machine("cpu", directory) is None

    path = known.remember(machine)

    assert path.parent == tmp_path / "machines"
    assert known.known_machine("cpu", directory) == machine
    assert known.known_machine("cuda", directory) is None


@pytest.mark.parametrize("what", ["cores", "threads", "memory_bytes", "device", "disk", "torch"])
def test_a_machine_that_changed_is_measured_anew(measured, tmp_path, monkeypatch, what):
    machine, directory = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path))
    known.remember(machine)
    now = {**machine.identity, what: "another"}

    monkeypatch.setattr(known, "identity_of", lambda *_: now)

    assert known.known_machine("cpu", directory) is None


def test_numbers_of_another_identity_are_not_used_whatever_the_file_is_called(
    measured, tmp_path, monkeypatch
):
    machine, directory = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path))
    path = known.remember(machine)
    other = replace(machine, identity={**machine.identity, "torch": "0"})

    path.write_text(other.to_json(), encoding="utf-8")

    assert known.known_machine("cpu", directory) is None


@pytest.mark.parametrize("text", ["", "{", '{"format": 0}'])
def test_a_file_that_can_t_be_read_is_no_machine(measured, tmp_path, monkeypatch, text):
    machine, directory = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path))
    known.remember(machine).write_text(text, encoding="utf-8")

    assert known.known_machine("cpu", directory) is None


def test_the_number_of_threads_is_part_of_a_machine(tmp_path, monkeypatch):
    before = known.identity_of("cpu", tmp_path)

    monkeypatch.setenv("OMP_NUM_THREADS", "7")

    assert known.identity_of("cpu", tmp_path) != before


# ---- the command


def test_profile_prints_a_table_keeps_the_machine_and_writes_it(
    measured, tmp_path, monkeypatch, capsys
):
    machine, _ = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path / "cache"))
    asked = []

    def measure(name, backend, directory, effort, say):
        asked.append((name, directory, effort.memory_bytes))
        return machine

    monkeypatch.setattr("flexport.bench.profile.measure.measure_machine", measure)
    options = ["--backend", "cpu", "--offload-dir", str(tmp_path), "--memory", "96MiB"]

    code = main(["profile", *options, "--output", str(tmp_path / "mine.json")])

    out, err = capsys.readouterr()
    assert code == 0
    assert asked == [("cpu", tmp_path, 96 << 20)]
    assert "disk_read.bytes_per_s" in out
    assert "device.products[float32] at 1" in out
    assert read_machine(tmp_path / "mine.json") == machine
    (kept,) = (tmp_path / "cache" / "machines").iterdir()
    assert str(kept) in err


def test_profile_json_is_a_machine_file(measured, tmp_path, monkeypatch, capsys):
    machine, _ = measured
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path))
    monkeypatch.setattr("flexport.bench.profile.measure.measure_machine", lambda *_: machine)

    assert main(["profile", "--backend", "cpu", "--json"]) == 0

    assert machine_from_dict(json.loads(capsys.readouterr().out)) == machine


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory", "1MiB"], "too little"),
        (["--memory", "lots"], "is not a size"),
        (["--output", "/no/such/folder/machine.json"], "no folder"),
        (["--backend", "abacus"], "not installed"),
    ],
)
def test_profile_refuses_what_can_t_work_before_it_measures(options, words, capsys):
    assert main(["profile", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_cache_that_can_t_be_written_costs_no_result(measured, tmp_path, monkeypatch, capsys):
    machine, _ = measured
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLEXPORT_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("flexport.bench.profile.measure.measure_machine", lambda *_: machine)

    assert main(["profile", "--backend", "cpu"]) == 0

    out, err = capsys.readouterr()
    assert "visit_s" in out
    assert "FLEXPORT_CACHE" in err


def test_effort_says_what_one_measurement_keeps():
    assert timing.Effort(memory_bytes=1 << 30).pool_bytes == 1 << 28


def test_an_infinite_rate_is_told_in_words():
    from flexport.cli.profile import _table

    assert "as they come" in _table(shipped("t4"))

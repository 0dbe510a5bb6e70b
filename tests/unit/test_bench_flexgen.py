"""FlexGen's schedule on a T4's numbers: what its authors measured, and why it takes so long."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from round_machine import machine as round_machine

from flexport.bench.flexgen.__main__ import T4, main
from flexport.bench.flexgen.own import best_policy, same_policy
from flexport.bench.flexgen.published import GEN_LEN, PUBLISHED, Setting
from flexport.bench.flexgen.schedule import placement, times
from flexport.errors import UsageError
from flexport.models import known_config, spec_of
from flexport.planner.machine import read_machine

MACHINE = read_machine(T4)
SMALL = Setting(
    model="facebook/opt-1.3b",
    prompt_len=64,
    batch_size=4,
    num_batches=3,
    percent=(20, 80, 0, 100, 0, 100),
    tok_s=1.0,
)


def spec_named(name):
    return spec_of(known_config(name) or {})


def small_s(**changed):
    setting = replace(SMALL, **changed)
    return times(spec_named(setting.model), setting, MACHINE)


@pytest.mark.parametrize(
    "setting",
    PUBLISHED,
    ids=lambda s: f"{s.model[13:]}-{s.prompt_len}-{s.batch_size}x{s.num_batches}-{s.source}",
)
def test_what_was_published_is_foretold_within_an_eighth(setting):
    """With one set of numbers for all rows. The paper says nothing of its runs' spread."""
    found = times(spec_named(setting.model), setting, MACHINE)

    assert setting.num_rows * GEN_LEN / found.run_s == pytest.approx(setting.tok_s, rel=0.125)


def test_the_largest_models_time_goes_where_the_paper_says():
    """Its breakdown, with nothing overlapping: seconds of prompts, and of decode steps."""
    setting = next(s for s in PUBLISHED if s.model.endswith("175b") and not s.overlaps)

    found = times(spec_named(setting.model), setting, MACHINE)

    assert found.prefill_s == pytest.approx(2711, rel=0.15)
    assert found.parts_s["prefill"]["compute"] == pytest.approx(2220, rel=0.05)
    assert found.decode_s == pytest.approx(11315, rel=0.05)
    assert found.parts_s["decode"]["cache"] == pytest.approx(7046, rel=0.05)
    assert found.parts_s["decode"]["weights"] == pytest.approx(3047, rel=0.25)


@pytest.mark.parametrize(
    ("device", "shares"),
    [(0, (0, 0)), (10, (0, 0)), (20, (0.25, 0)), (30, (0.25, 0.5)), (50, (0.5, 0.5)), (60, (0.5, 0.5)),
     (70, (0.75, 0.5)), (80, (0.75, 1)), (100, (1, 1))],
)  # fmt: skip
def test_whole_tensors_are_placed_by_their_middle(device, shares):
    """Four matrices of attention, and two of an MLP: no other shares can be had."""
    attention = placement([100] * 4, device, 100 - device)
    mlp = placement([400] * 2, device, 100 - device)

    assert (attention["device"] / 400, mlp["device"] / 800) == shares
    assert attention["disk"] == mlp["disk"] == 0


def test_twenty_per_cent_on_the_device_are_eight():
    h = 7168
    attention = placement([*[h * h, h] * 4, h, h], 20, 80)
    mlp = placement([4 * h * h, 4 * h, 4 * h * h, h, h, h], 20, 80)

    share = (attention["device"] + mlp["device"]) / (12 * h * h)
    assert share == pytest.approx(0.0834, abs=0.0005)


def test_half_on_disk_is_the_first_half_of_each_layer():
    assert placement([1, 1, 1, 1], 0, 50) == {"disk": 2, "host": 2, "device": 0}
    assert placement([2, 3, 5], 25, 50) == {"disk": 2, "host": 3, "device": 5}


def test_a_barrier_ends_each_step_so_weights_hide_behind_one_micro_batch_only():
    """Twice as many micro-batches, each half as large, leave half of the time to hide in."""
    few = small_s(batch_size=256, num_batches=1, percent=(0, 100, 100, 0, 100, 0))
    many = small_s(batch_size=64, num_batches=4, percent=(0, 100, 100, 0, 100, 0))

    assert many.run_s > few.run_s


def test_what_overlaps_takes_its_longest_part_and_else_the_sum():
    overlapped, serial = small_s(), small_s(overlaps=False)

    parts_s = sum(sum(parts.values()) for parts in serial.parts_s.values())
    num_steps = GEN_LEN * (2 * 24 + 2) * 3
    assert serial.run_s == pytest.approx(parts_s + num_steps * 5e-5)
    assert overlapped.run_s < serial.run_s
    assert overlapped.parts_s == serial.parts_s


def test_a_cpu_that_attends_spares_the_way_to_the_device():
    assert small_s(prompt_len=1024).decode_s < small_s(prompt_len=1024, cpu=False).decode_s


def test_weights_in_four_bits_are_decoded_for_every_micro_batch():
    packed = {"percent": (100, 0, 100, 0, 100, 0), "packs_weights": True}
    values = 24 * 12 * 2048**2

    for num_batches in (1, 3):
        shape = {"batch_size": 12 // num_batches, "num_batches": num_batches}
        more_s = (
            small_s(**packed, **shape).decode_s
            - small_s(percent=(100, 0, 100, 0, 100, 0), **shape).decode_s
        )
        decoded_s = (GEN_LEN - 1) * num_batches * MACHINE.device.decode_s("int4", values)
        # The head is decoded, too.
        assert decoded_s < more_s < 1.1 * decoded_s


def test_a_device_without_memory_of_its_own_is_refused():
    with pytest.raises(UsageError, match="memory of its own"):
        times(spec_named(SMALL.model), SMALL, round_machine(unified=True))


def test_flexport_is_faster_with_the_same_policy():
    """No barrier, weights decoded once a sweep, and shares that are what was asked for."""
    setting = next(s for s in PUBLISHED if s.model.endswith("30b"))
    found = times(spec_named(setting.model), setting, MACHINE)

    same, best = same_policy(setting, MACHINE), best_policy(setting, MACHINE)

    assert same.fits
    assert same.tok_s > setting.num_rows * GEN_LEN / found.run_s
    assert best.tok_s >= same.tok_s
    assert same.policy.weights.device == 0.2


def test_the_table_has_a_row_for_each_run_of_a_model(capsys):
    assert main(["--model", "facebook/opt-6.7b"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert main(["--model", "facebook/opt-6.7b", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    rows = [setting for setting in PUBLISHED if setting.model.endswith("-6.7b")]
    assert table[0].split()[:3] == ["model", "prompt", "block"]
    assert len(table) == 1 + len(rows)
    assert [line["setting"]["tok_s"] for line in lines] == [setting.tok_s for setting in rows]
    assert f"{lines[0]['predicted_tok_s']:.2f}" in table[1]


def test_a_file_that_is_no_machine_is_refused(tmp_path, capsys):
    assert main(["--machine", str(tmp_path / "none.json")]) == 1
    assert "can't read the machine file" in capsys.readouterr().err


def test_it_needs_no_torch():
    script = (
        "import sys; from flexport.bench.flexgen.__main__ import main\n"
        "assert main(['--model', 'facebook/opt-6.7b']) == 0 and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)

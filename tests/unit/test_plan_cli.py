"""`flexport plan`: for this machine or another one, read again by `flexport run`, or refused."""

from __future__ import annotations

import csv
import json
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport import registry
from flexport.apps.lengths import evenly
from flexport.cli import plan as command
from flexport.cli.main import main
from flexport.planner.machine import Computer, Curve, Lane, Machine
from flexport.planner.search import undominated
from flexport.policy import Policy

GIB = 1 << 30
OPT = ["--model", "facebook/opt-1.3b", "--load-format", "dummy"]
TINY = {
    "model_type": "opt", "vocab_size": 64, "hidden_size": 32, "ffn_dim": 64,
    "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 100,
    "word_embed_proj_dim": 32,
}  # fmt: skip


def computer(flops_per_s: float) -> Computer:
    return Computer(
        products={"float16": Curve(rows=(1, 64), flops_per_s=(flops_per_s / 64, flops_per_s))},
        memory_bytes_per_s=1e11,
        touched_values_per_s=1e10,
        prompt_attention_flops_per_s=flops_per_s,
        cache_bytes_per_s={1: 1e11},
        sampled_values_per_s=1e10,
        visit_s=1e-4,
    )


MACHINE = Machine(
    name="a card in a drawer",
    about="made up",
    backend="some-plug-in",
    dtypes=("float16",),
    unified=False,
    addressable=False,
    page_tokens=64,
    device_bytes=2 * GIB,
    host_bytes=8 * GIB,
    disk_bytes=50 * GIB,
    disk_read=Lane(bytes_per_s=1e9),
    disk_write=Lane(bytes_per_s=5e8),
    up=Lane(bytes_per_s=1e10),
    down=Lane(bytes_per_s=1e10),
    device=computer(1e13),
    host=computer(1e11),
    sources={"": "estimated"},
)


@pytest.fixture
def machine(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    path.write_text(MACHINE.to_json())
    return str(path)


@pytest.fixture
def tiny(tmp_path: Path) -> list[str]:
    """Options of a model of 100 positions and no tokenizer."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(TINY))
    return ["--model", str(directory), "--load-format", "dummy"]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]) -> Any:
    """plan(*options): what `flexport plan --json` says."""

    def get(*options: object) -> dict[str, Any]:
        code = main(["plan", "--json", *map(str, options)])
        out, err = capsys.readouterr()
        assert code == 0, err
        found: dict[str, Any] = json.loads(out)
        return found

    return get


def test_a_plan_says_where_all_lives_how_long_it_takes_and_what_limits_it(capsys, machine):
    code = main(["plan", *OPT, "--machine", machine, "--num-prompts", "70", "--gen-len", "9"])

    out = capsys.readouterr().out
    assert code == 0
    for expected in (
        "facebook/opt-1.3b on some-plug-in in float16",
        "of a budget of",
        "70 rows of 128 tokens and 9 new ones",
        "limits it, busy for",
        "by the numbers of a card in a drawer",
        "copying to the device",
    ):
        assert expected in out
    assert "flexport profile" not in out  # which would measure another machine


def test_another_machine_is_planned_for_by_its_file_and_none_here_is_looked_for(
    plan, machine, monkeypatch
):
    def fail(*names: object) -> Any:
        raise AssertionError(names)

    for name in ("describe_backend", "open_backend", "which_backend"):
        monkeypatch.setattr(command, name, fail)
    monkeypatch.setattr(registry, "backends", fail)

    found = plan(*OPT, "--machine", machine)
    less = plan(*OPT, "--machine", machine, "--device-memory", "1GiB")

    assert found["budgets"] == {
        "device_bytes": 2 * GIB, "host_bytes": 8 * GIB, "disk_bytes": 50 * GIB
    }  # fmt: skip
    assert (found["backend"], found["dtype"], found["unified"]) == (
        "some-plug-in",
        "float16",
        False,
    )
    assert found["machine"] == {"name": "a card in a drawer", "numbers": "asked"}
    assert less["budgets"]["device_bytes"] == GIB
    assert less["policy"]["weights"]["device"] < found["policy"]["weights"]["device"]


def test_twice_the_machine_is_half_the_time(plan, tmp_path):
    halves = json.loads(MACHINE.to_json())
    for lane in ("disk_read", "disk_write", "up", "down"):
        halves[lane]["bytes_per_s"] /= 2
    for computer in (halves["device"], halves["host"]):
        curve = computer["products"]["float16"]
        curve["flops_per_s"] = [rate / 2 for rate in curve["flops_per_s"]]
        computer["visit_s"] *= 2
        computer["cache_bytes_per_s"] = {"1": computer["cache_bytes_per_s"]["1"] / 2}
        for rate in (
            "touched_values_per_s",
            "prompt_attention_flops_per_s",
            "sampled_values_per_s",
        ):
            computer[rate] /= 2
    (tmp_path / "whole.json").write_text(MACHINE.to_json())
    (tmp_path / "half.json").write_text(json.dumps(halves))
    policy = tmp_path / "policy.json"
    policy.write_text(Policy(num_batches=2).to_json())

    whole, half = (
        plan(*OPT, "--policy", policy, "--machine", tmp_path / name, "--device-memory", "20GiB")
        for name in ("whole.json", "half.json")
    )

    for phase in ("prefill", "decode"):
        seconds = [each["predicted"]["seconds"][phase] for each in (whole, half)]
        assert seconds[1] == pytest.approx(2 * seconds[0])


def test_what_is_printed_as_json_is_a_policy_that_run_takes(plan, machine, tmp_path):
    options = [*OPT, "--machine", machine, "--percent", "20", "30", "50", "50", "100", "0"]
    first = plan(*options, "--batch-size", "3")
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(first))

    again = plan(*OPT, "--machine", machine, "--policy", path)

    assert Policy.from_file(path).to_dict() == first["policy"]
    assert first["policy"]["weights"] == {"device": 0.2, "host": 0.3, "disk": 0.5}
    assert first.pop("gains")  # a policy that is given is not improved on
    assert again == first


def test_a_plan_says_what_more_of_each_thing_would_bring(plan, capsys, machine):
    options = [*OPT, "--machine", machine, "--num-prompts", "70", "--device-memory", "1GiB"]

    found = plan(*options)
    assert main(["plan", *options]) == 0

    before = found["predicted"]["generation_tok_s"]
    assert {gain["what"] for gain in found["gains"]} >= {"device", "host", "disk", "disk_to_host"}
    assert all(gain["tok_s"] >= before for gain in found["gains"])
    best = max(found["gains"], key=lambda gain: gain["tok_s"])
    assert best["tok_s"] > 1.01 * before
    assert f"{best['tok_s']:.3g} tok/s" in capsys.readouterr().out


def test_rows_of_a_file_say_how_long_rows_are(plan, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt_token_ids": [5] * 10, "max_tokens": 7},
        {"prompt_token_ids": [5] * 30},
        {"prompt_token_ids": [5] * 20, "max_tokens": 4},
        {"prompt_token_ids": [5] * 200},  # longer than the context: it gets an error row
    ]
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")

    found = plan(*tiny, "-i", path, "--max-tokens", 10)

    assert found["job"] == {
        "prompt_tokens": 30, "new_tokens": 10, "num_rows": 3, "mean_prompt_tokens": 20,
        "mean_new_tokens": 7,
    }  # fmt: skip


def test_all_rows_of_a_long_file_are_planned_for(plan, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    short, long = ({"prompt_token_ids": [5] * size, "max_tokens": 2} for size in (10, 20))
    lines = [json.dumps(short)] * 2500 + [json.dumps(long)] * 2500
    path.write_text("\n".join(lines) + "\n")

    found = plan(*tiny, "-i", path)

    assert found["job"]["num_rows"] == 5000
    assert found["job"]["prompt_tokens"] == 20
    assert found["job"]["mean_prompt_tokens"] == pytest.approx(15, abs=0.1)


def test_without_a_vocabulary_text_is_estimated_and_that_is_said(capsys, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "abcdefghijklmnop", "max_tokens": 2}\n')

    code = main(["plan", *tiny, "-i", str(path), "--json"])

    out, err = capsys.readouterr()
    assert code == 0
    assert json.loads(out)["job"]["prompt_tokens"] == 4
    assert "4 bytes of text" in err


def test_the_embedded_demo_is_planned_as_it_is_run(plan):
    found = plan()

    assert found["model"] == "flexport-demo"
    assert found["job"]["num_rows"] == 256


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trace", "t.json"], "--trace"),
        (["--plot", "x.svg"], "add --frontier"),
        (["--frontier", "--plot", "x.png"], "SVG"),
        (["--frontier", "--csv", "-", "--json"], "stdout"),
        (["--machine", "nowhere"], "no machine named"),
        (["--machine", "nowhere", "--backend", "cpu"], "--backend is of this machine"),
        (["--input", "x", "--prompt-len", "3"], "--prompt-len and --input"),
        (["--max-tokens", "3"], "--gen-len"),
        (["--input", "no-such-file"], "can't read no-such-file"),
        (["--prompt-len", "3000"], "longer than the 2048 positions"),
        (["--device-memory", "10MiB"], "it takes"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_planned_is_refused_and_says_why(capsys, options, words):
    code = main(["plan", *OPT, *options])

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert words in err


def test_an_input_without_a_row_that_runs_is_refused(capsys, tiny, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("not json\n")

    code = main(["plan", *tiny, "-i", str(path)])

    assert code == 2
    assert "no row of the input can be run" in capsys.readouterr().err


def test_the_frontier_is_a_table_a_csv_and_a_picture(capsys, machine, tmp_path):
    table, picture = tmp_path / "f.csv", tmp_path / "f.svg"
    options = ["--frontier", "--csv", str(table), "--plot", str(picture)]

    code = main(["plan", *OPT, "--machine", machine, "--num-prompts", "40", *options])

    out = capsys.readouterr().out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert code == 0
    assert len(rows) >= 2
    for name in ("latency_s", "tok_s"):
        values = [float(row[name]) for row in rows]
        assert values == sorted(values), name
    assert {"weights.device", "cache.disk", "batch_size"} <= set(rows[0])
    assert out.count(" x ") >= len(rows)
    drawn = ET.fromstring(picture.read_text())
    assert sum(each.tag.endswith("circle") for each in drawn.iter()) == len(rows)


def test_the_frontier_holds_the_best_plan_of_all(plan, machine):
    found = plan(*OPT, "--machine", machine, "--num-prompts", "40", "--frontier")

    best = max(each["tok_s"] for each in found["frontier"])
    assert best >= found["predicted"]["generation_tok_s"]


@given(
    st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)).map(lambda p: (*p, Policy())), min_size=1)
)
def test_no_point_of_a_frontier_is_beaten_and_all_others_are(points):
    kept = undominated(points)

    def beaten(point, by):
        return by[0] <= point[0] and by[1] >= point[1] and by[:2] != point[:2]

    assert not [p for p in kept if any(beaten(p, other) for other in points)]
    assert all(any(beaten(p, k) or p == k for k in kept) for p in points)


@given(st.integers(0, 400), st.integers(2, 40))
def test_lines_are_picked_the_same_distance_apart(count, most):
    kept, num_lines = evenly((b"%d" % number for number in range(count)), most)

    numbers = [int(line) for line in kept]
    assert num_lines == count
    assert len(kept) <= most
    assert len(kept) > most / 2 - 1 or len(kept) == count
    assert len({after - before for before, after in pairwise(numbers)}) <= 1
    if len(numbers) > 1:
        assert numbers[0] == 0
        assert count - numbers[-1] <= numbers[1]

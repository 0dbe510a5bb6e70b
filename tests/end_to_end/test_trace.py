"""The trace of a run tells what its report sums up."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import closing

import pytest

import flexport
from flexport.testing.discrete import DiscreteBackend


def test_the_trace_has_all_bytes_and_all_computing_of_the_report_with_layers_and_batches(
    reference, continue_greedily, nothing_left, tmp_path
):
    found = reference()
    path = tmp_path / "trace.json"
    with (
        closing(DiscreteBackend()) as backend,
        flexport.LLM(
            found.directory,
            backend=backend,
            dtype="float32",
            percent=[20, 30, 0, 40, 30, 30],
            batch_size=3,
            num_batches=2,
            offload_dir=nothing_left,
            trace=path,
        ) as llm,
    ):
        assert continue_greedily(llm, found.prompts, [6] * 10) == [
            found.continued(row, 6) for row in range(10)
        ]
        report = llm.report

    moved: defaultdict[str, int] = defaultdict(int)
    busy_s: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, set[str]] = defaultdict(set)
    for event in json.loads(path.read_text()):
        if event["ph"] == "X":
            waiting = event["name"].startswith("waiting")
            lane = "waiting" if waiting else event["cat"]
            busy_s[lane] += event["dur"] / 1e6
            names[lane].add(event["name"])
            moved[lane] += event.get("args", {}).get("bytes", 0)

    # Loading is traced, too, and is not in the report's bytes.
    for lane, num_bytes in report["moved_bytes"].items():
        assert moved[lane] >= num_bytes > 0, lane
    assert moved["host_to_disk"] == report["moved_bytes"]["host_to_disk"]
    assert busy_s["compute"] == pytest.approx(report["busy_seconds"]["compute"], rel=0.01)
    assert busy_s["waiting"] == pytest.approx(report["wait_seconds"]["compute"], rel=0.01)
    assert {"weights, layer 1", "cache, layer 2, batch 1"} <= names["disk_to_host"]
    assert {"weights, layer 1", "activations, layer 1, batch 0"} <= names["host_to_device"]
    assert {"cache, layer 1, batch 3", "activations, layer 1, batch 0"} <= names["host_to_disk"]
    assert {"layer 0, batch 0", "layer 2, batch 3"} <= names["compute"]


def test_a_trace_is_asked_for_on_the_command_line(tmp_path, capsys):
    from flexport.cli.main import main

    path = tmp_path / "trace.json"

    code = main(["run", "--prompt", "hello", "--max-tokens", "2", "--trace", str(path)])

    assert code == 0
    assert any(event["name"] == "layer 1, batch 0" for event in json.loads(path.read_text()))
    assert json.loads(capsys.readouterr().out)["finish_reason"] in ("length", "stop")

"""A trace is a file that viewers open, however the run ends."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from flexport.engine.trace import COMPUTE, LANES, Trace
from flexport.errors import StorageError, UsageError


def events(path) -> list[dict[str, Any]]:
    """What a trace holds besides names."""
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_events_keep_their_lane_times_and_bytes(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    began = trace._began_s

    trace.record("disk_to_host", 3, "weights, layer 2", began + 1.0, began + 1.5, 4096)
    trace.record(COMPUTE, 0, "layer 2, batch 1", began + 1.25, began + 2.0)
    trace.close()

    read, computed = events(path)
    assert (read["name"], read["cat"]) == ("weights, layer 2", "disk_to_host")
    assert (read["ts"], read["dur"], read["args"]) == (1e6, 5e5, {"bytes": 4096})
    assert (computed["ts"], computed["dur"]) == (1.25e6, 7.5e5)
    assert read["tid"] != computed["tid"]


def test_each_thread_of_each_lane_has_a_row_with_its_name_in_the_order_of_bytes(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    for lane in reversed(LANES):
        for thread in (1, 0):
            trace.record(lane, thread, "x", 0.0, 1.0)
    trace.close()

    named = {
        event["tid"]: event["args"]["name"]
        for event in json.loads(path.read_text())
        if event["name"] == "thread_name"
    }
    assert [named[row] for row in sorted(named)] == [
        f"{lane} {i}" for lane in LANES for i in (0, 1)
    ]


def test_events_of_many_threads_do_not_mix(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)

    def work(thread: int) -> None:
        for number in range(200):
            trace.record("host_to_disk", thread, f"{thread}-{number}", number, number + 1.0)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    trace.close()

    assert len({event["name"] for event in events(path)}) == 800


def test_a_trace_that_was_broken_off_is_an_array_without_its_end(tmp_path):
    path = tmp_path / "trace.json"
    trace = Trace(path)
    trace.record(COMPUTE, 0, "layer 0", 0.0, 1.0)
    trace._file.flush()

    assert json.loads(path.read_text() + "]")[-1]["name"] == "layer 0"
    trace.close()
    trace.close()


def test_a_trace_that_can_not_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UsageError, match="can't write the trace"):
        Trace(tmp_path / "nowhere" / "trace.json")


def test_a_disk_that_fills_up_costs_the_trace_and_says_so_in_the_end(tmp_path, monkeypatch):
    trace = Trace(tmp_path / "trace.json")

    class Full:
        closed = False

        def write(self, text: str) -> None:
            raise OSError(28, "No space left on device")

    trace._file.close()
    monkeypatch.setattr(trace, "_file", Full())
    trace.record(COMPUTE, 0, "layer 0", 0.0, 1.0)

    with pytest.raises(StorageError, match="not whole: No space left"):
        trace.close()

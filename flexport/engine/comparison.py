"""What was predicted beside what was measured, and how both read to a person.

Rows may end before they have all the tokens that they might, and a pipe has as many rows as it
has. So a job that has ended is predicted once more, for the rows and tokens that there were: what
is left between the two is the model's fault, or the machine's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flexport.planner.predict import COMPUTE, HOST_COMPUTE, Prediction
from flexport.units import format_bytes, format_seconds, format_tok_s

__all__ = ["LANES", "comparison", "comparison_table", "lane_table", "measured"]

LANES = {
    COMPUTE: "computing",
    HOST_COMPUTE: "computing on the CPU beside the device",
    "disk_to_host": "reading from disk",
    "host_to_device": "copying to the device",
    "device_to_host": "copying from the device",
    "host_to_disk": "writing to disk",
}
"""In the report's names, and in words that go with "is busy" and "limits"."""

WAITING = "waiting for copies"

_FIGURES = ("generation_tok_s", "seconds", "busy_seconds", "moved_bytes", "limited_by")
"""Of a prediction, what a run has, too."""


def measured(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a run took, in the shape of `Prediction.to_dict`."""
    busy_s = report["busy_seconds"]
    return {
        "generation_tok_s": report["throughput"]["generation_tok_s"],
        "seconds": dict(report["seconds"]),
        "busy_seconds": dict(busy_s),
        "moved_bytes": dict(report["moved_bytes"]),
        "limited_by": max(busy_s, key=lambda lane: busy_s[lane]),
        "wait_seconds": dict(report["wait_seconds"]),
    }


def comparison(predicted: Prediction, report: Mapping[str, Any]) -> dict[str, Any]:
    """Both in one shape. `predicted` is of the rows and tokens that the report is of.

    `ratio` is how many times as long as predicted all sweeps took.
    """
    said = {name: predicted.to_dict()[name] for name in _FIGURES}
    said["wait_seconds"] = {COMPUTE: max(0.0, predicted.run_s - predicted.busy_s[COMPUTE])}
    found = measured(report)
    return {
        "predicted": said,
        "measured": found,
        "ratio": run_s(found) / predicted.run_s if predicted.run_s else None,
    }


def run_s(figures: Mapping[str, Any]) -> float:
    """Seconds of all sweeps."""
    seconds = figures["seconds"]
    return float(seconds["prefill"] + seconds["decode"])


def comparison_table(compared: Mapping[str, Any]) -> str:
    """Predicted and measured side by side, for a person to read."""
    both = [compared["predicted"], compared["measured"]]
    rows = [["", "predicted", "measured"]]
    rows.append(["generated", *(format_tok_s(each["generation_tok_s"]) for each in both)])
    for phase in ("load", "prefill", "decode"):
        rows.append([phase, *(format_seconds(each["seconds"][phase]) for each in both)])
    for lane, words in LANES.items():
        busy_s = [each["busy_seconds"].get(lane, 0.0) for each in both]
        if lane == COMPUTE or any(busy_s):
            rows.append([words, *(_share(s, each) for s, each in zip(busy_s, both, strict=True))])
        if lane == COMPUTE:
            waits = (_share(each["wait_seconds"][COMPUTE], each) for each in both)
            rows.append([WAITING, *waits])
    return "\n".join(_lines(rows))


def lane_table(predicted: Prediction) -> str:
    """What each lane has to do, for a person to read."""
    rows = [["lane", "busy", "share", "bytes"]]
    for lane, words in LANES.items():
        busy_s = predicted.busy_s.get(lane, 0.0)
        if busy_s or lane == COMPUTE:
            moved = (
                format_bytes(predicted.moved_bytes[lane]) if lane in predicted.moved_bytes else ""
            )
            share = f"{100 * busy_s / predicted.run_s:.0f} %" if predicted.run_s else ""
            rows.append([words, format_seconds(busy_s), share, moved])
    return "\n".join(_lines(rows))


def _share(seconds: float, figures: Mapping[str, Any]) -> str:
    total_s = run_s(figures)
    share = f" {100 * seconds / total_s:3.0f} %" if total_s else ""
    return f"{format_seconds(seconds)}{share}"


def _lines(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]

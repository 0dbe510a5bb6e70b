"""A run's lanes over time, in the Chrome trace format, which https://ui.perfetto.dev opens.

One event for each read, copy, write, computation and wait, with its layer and batch, written as
it ends: a run that is killed leaves a trace too, since viewers take an array without its end.
Source of the format: "Trace Event Format", JSON array form, complete events ("X").
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

from flexport.errors import StorageError, UsageError

__all__ = ["COMPUTE", "HOST_COMPUTE", "Trace"]

COMPUTE = "compute"
"""The lane that is no link."""

HOST_COMPUTE = "host_compute"
"""What the CPU computes beside the device; a part of the time that `compute` shows."""

LANES = (
    "disk_to_host",
    "host_to_device",
    COMPUTE,
    HOST_COMPUTE,
    "device_to_host",
    "host_to_disk",
)
"""From top to bottom, as bytes go."""

MOST_THREADS = 64
"""Of one lane; its threads have numbers of their own."""


class Trace:
    """Events, written to a file as they come. May be called from any thread."""

    def __init__(self, path: Path) -> None:
        """Empties the file. Raises UsageError if it can't be written."""
        self._path = path
        self._lock = threading.Lock()
        self._shown: set[int] = set()
        self._error: OSError | None = None
        self._began_s = time.perf_counter()
        try:
            self._file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"can't write the trace {path}: {error.strerror}") from error
        self._write(
            "[\n", {"name": "process_name", "ph": "M", "pid": 1, "args": {"name": "flexport"}}
        )

    def record(
        self,
        lane: str,
        thread: int,
        label: str,
        started_s: float,
        ended_s: float,
        num_bytes: int = 0,
    ) -> None:
        """What a lane did from when to when, by `time.perf_counter`."""
        row = LANES.index(lane) * MOST_THREADS + thread
        event: dict[str, Any] = {
            "name": label,
            "cat": lane,
            "ph": "X",
            "pid": 1,
            "tid": row,
            "ts": round((started_s - self._began_s) * 1e6, 1),
            "dur": round((ended_s - started_s) * 1e6, 1),
        }
        if num_bytes:
            event["args"] = {"bytes": num_bytes}
        with self._lock:
            if row not in self._shown:
                self._shown.add(row)
                self._write(",\n", self._of_row("thread_name", row, name=f"{lane} {thread}"))
                self._write(",\n", self._of_row("thread_sort_index", row, sort_index=row))
            self._write(",\n", event)

    def close(self) -> None:
        """End the file; a second call does nothing. Raises StorageError if some of it is missing."""
        with self._lock:
            if self._file.closed:
                return
            try:
                self._file.write("\n]\n")
                self._file.close()
            except OSError as error:
                self._error = self._error or error
        if self._error is not None:
            raise StorageError(
                f"the trace {self._path} is not whole: {self._error.strerror}"
            ) from self._error

    @staticmethod
    def _of_row(what: str, row: int, **args: Any) -> dict[str, Any]:
        return {"name": what, "ph": "M", "pid": 1, "tid": row, "args": args}

    def _write(self, before: str, event: dict[str, Any]) -> None:
        if self._error is not None or self._file.closed:
            return
        try:
            self._file.write(before + json.dumps(event))
        except OSError as error:  # a run is worth more than its trace; `close` tells
            self._error = error

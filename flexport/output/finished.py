"""Which rows an output file already holds: what `--resume` need not run again.

A row is finished once the output has a line for it, be it an answer or an error: a resumed job
never writes a second line for a row. Answers are known by their id, errors by their line number,
since the id of a refused line may be that of another row (a duplicate) or made up (not JSON).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO

from flexport.errors import UsageError

__all__ = ["Finished", "scan"]


class Finished:
    """The rows that an output file holds; 16 bytes of digest each."""

    def __init__(self) -> None:
        self.num_answers = 0
        self.num_errors = 0
        self._answers: set[bytes] = set()
        self._error_lines: set[int] = set()

    def has_answer(self, key: str) -> bool:
        """Whether the row of that id, as text, has been answered."""
        return _digest(key) in self._answers

    def has_error(self, line: int) -> bool:
        """Whether that line of the input has been refused."""
        return line in self._error_lines

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one output row. Raises KeyError or TypeError if it is none of flexport's."""
        error = row["error"] if "custom_id" in row else row.get("error")
        if error is not None:
            line = error["line"] if "custom_id" in row else row["line"]
            self._error_lines.add(int(line))
            self.num_errors += 1
            return
        if "custom_id" in row:
            row_id = row["custom_id"]
            row["response"]["body"]["choices"]
        else:
            row_id = row["id"]
            row["finish_reason"]
        self._answers.add(_digest(str(row_id)))
        self.num_answers += 1


def scan(file: BinaryIO, path: Path) -> tuple[Finished, int]:
    """The rows of an output file, and the length in bytes of its whole lines.

    What follows the last newline is torn: the run was killed as it wrote it. Raises UsageError
    for a file that is not the output of a run; `path` is named there.
    """
    finished = Finished()
    whole_bytes = 0
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            break
        try:
            finished.add(json.loads(raw))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"line {number} of {path} is not an output row of flexport, so the file can't be "
                "resumed; name the output of the interrupted run, or another file"
            ) from error
        whole_bytes += len(raw)
    return finished, whole_bytes


def _digest(key: str) -> bytes:
    return blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()

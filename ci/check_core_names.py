"""The core names no hardware: no file under flexport/ may contain the word "cuda" or "mps".

What differs from device to device belongs into a plug-in under backends/; what the core must
know of a device is a field of `flexport.backend.Capabilities`. A name in the core is the first
step to an `if` on it, so comments and docstrings count too.

Exit code: 0 if no line does, 1 with the list of lines if any does.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

CORE = Path(__file__).resolve().parent.parent / "flexport"

WORDS = re.compile(r"(?<![a-z])(cuda|mps)(?![a-z])", re.IGNORECASE)
"""As words, also within an identifier such as is_cuda; "dumps" and "timestamps" are neither."""


def offending_lines(core: Path) -> list[str]:
    """Each line of a Python file under `core` that names hardware, as "path:line: text"."""
    return [
        f"{path.relative_to(core.parent).as_posix()}:{number}: {line.strip()}"
        for path in sorted(core.rglob("*.py"))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if WORDS.search(line)
    ]


def main() -> int:
    """Print the offending lines; returns the exit code."""
    lines = offending_lines(CORE)
    if not lines:
        print("the core names no hardware")
        return 0
    print("the core names hardware, which belongs into a plug-in under backends/:")
    print("\n".join(f"  {line}" for line in lines))
    return 1


if __name__ == "__main__":
    sys.exit(main())

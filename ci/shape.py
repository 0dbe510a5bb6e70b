"""How long each room has become: `python3 ci/shape.py`. A mirror, not a gate.

A stranger should read one room in ten minutes, which is some 600 lines of code. The table counts
lines of code without blank lines, comments and docstrings, and names each room's longest file.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

_NO_CODE = {
    tokenize.COMMENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
    tokenize.INDENT,
    tokenize.NEWLINE,
    tokenize.NL,
}


def code_lines(source: str) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(_docstring_lines(source)))


def _docstring_lines(source: str) -> Iterator[int]:
    """Lines of every string that stands alone as a statement."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            yield from range(node.lineno, (node.end_lineno or node.lineno) + 1)


def rooms() -> dict[str, list[Path]]:
    """The Python files of each room, plug-in and group of tests, by its path."""
    found: dict[str, list[Path]] = {}
    for top in ("flexport", "backends", "tests", "ci"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            # flexport/store/..., but the leaves flexport/*.py together as "flexport".
            room = "/".join(parts[:2]) if len(parts) > 2 else parts[0]
            found.setdefault(room, []).append(path)
    return found


def main() -> int:
    """Print the table on stdout."""
    print(f"{'room':<26} {'files':>5} {'code':>6}   longest file")
    total = 0
    for room, paths in rooms().items():
        sizes = {path: code_lines(path.read_text(encoding="utf-8")) for path in paths}
        longest = max(sizes, key=lambda path: sizes[path])
        total += sum(sizes.values())
        print(
            f"{room:<26} {len(paths):>5} {sum(sizes.values()):>6}   {longest.name} {sizes[longest]}"
        )
    print(f"{'all':<26} {'':>5} {total:>6}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How a run turned out beside what was predicted, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from flexport.engine.comparison import comparison_table

__all__ = ["show_judged"]


def show_judged(report: Mapping[str, Any]) -> None:
    """The table and the warnings of a job's report, as far as it has them."""
    if report.get("comparison"):
        print(comparison_table(report["comparison"]), file=sys.stderr)
    for warning in report.get("warnings", ()):
        print(f"flexport: {warning}", file=sys.stderr)

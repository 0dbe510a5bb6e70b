"""`flexport backends`: every registered backend, where it comes from, usable or why not."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from flexport.registry import Listing, auto_order, backends

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the list on stdout; returns the exit code."""
    listings = backends()
    order = auto_order(listings)
    auto = order[0] if order else None
    print(_as_json(listings, auto) if args.json else _as_table(listings, auto))
    return 0


def _as_json(listings: Sequence[Listing], auto: Listing | None) -> str:
    """One object a backend; `auto` is true for the one that `--backend auto` takes."""
    rows = [
        {
            "name": listing.name,
            "distribution": listing.distribution,
            "version": listing.version,
            "usable": listing.usable,
            "reason": listing.reason_not_usable,
            "auto": listing is auto,
        }
        for listing in listings
    ]
    return json.dumps(rows, indent=2)


def _as_table(listings: Sequence[Listing], auto: Listing | None) -> str:
    """Columns padded to their widest cell; "*" marks the one that `--backend auto` takes."""
    if not listings:
        return "no backend is registered; reinstall flexport"
    rows = [("", "NAME", "FROM", "USABLE")]
    for listing in listings:
        mark = "*" if listing is auto else ""
        origin = f"{listing.distribution} {listing.version}".strip()
        state = "yes" if listing.usable else f"no: {listing.reason_not_usable}"
        rows.append((mark, listing.name, origin, state))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]])
        for row in rows
    ]
    lines.append("" if auto is None else f"* is what --backend auto takes ({auto.name})")
    return "\n".join(lines).rstrip()

"""`flexport models`: the families that can be run, and the published models known by name."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from flexport.models import (
    families,
    known_config,
    known_names,
    kv_bytes_per_token,
    num_parameters,
    spec_of,
)
from flexport.units import format_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "list the supported model families and the models known by name"

_ITEM_BYTES = 2
"""Sizes are given for bfloat16 and float16."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print the lists on stdout; returns the exit code."""
    family_rows = [{"family": family.model_type, "from": family.source} for family in families()]
    model_rows = [_model_row(name) for name in known_names()]
    if args.json:
        print(json.dumps({"families": family_rows, "models": model_rows}, indent=2))
    else:
        print(_as_text(family_rows, model_rows))
    return 0


def _model_row(name: str) -> dict[str, Any]:
    config = known_config(name)
    assert config is not None, name
    spec = spec_of(config)
    return {
        "model": name,
        "family": spec.family,
        "parameters": num_parameters(spec),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "heads": spec.layers[0].attention.num_heads,
        "context_tokens": spec.max_positions,
        "weights_bytes": num_parameters(spec) * _ITEM_BYTES,
        "kv_bytes_per_token": sum(
            kv_bytes_per_token(spec, layer, _ITEM_BYTES) for layer in range(spec.num_layers)
        ),
    }


def _as_text(family_rows: Sequence[dict[str, Any]], model_rows: Sequence[dict[str, Any]]) -> str:
    families_table = [("FAMILY", "FROM"), *((row["family"], row["from"]) for row in family_rows)]
    models_table = [
        ("MODEL", "PARAMETERS", "LAYERS", "HIDDEN", "HEADS", "CONTEXT", "WEIGHTS", "KV PER TOKEN"),
        *(
            (
                row["model"],
                _format_count(row["parameters"]),
                str(row["layers"]),
                str(row["hidden_size"]),
                str(row["heads"]),
                str(row["context_tokens"]),
                format_bytes(row["weights_bytes"]),
                format_bytes(row["kv_bytes_per_token"]),
            )
            for row in model_rows
        ),
    ]
    return "\n".join(
        [
            *_columns(families_table),
            "",
            *_columns(models_table),
            "",
            "Sizes are for 16-bit weights and cache. Any checkpoint of a family runs from its",
            "directory or hub id; those named here also run with --load-format dummy, without it.",
        ]
    )


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: names to the left, all else to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _format_count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.0f} M"

"""`flexport models`: the families that can be run, and the models known by name; or one model."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from flexport.cli.table import columns
from flexport.models import about, families, known_config, known_names, spec_of, summary
from flexport.units import format_bytes, format_count

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="NAME|DIR",
        help="show this model: one known by name, or a directory's, whose checkpoint is looked at, "
        "too (default: list all)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Print the lists or the model on stdout; returns the exit code.

    That is 2, as for any input that can't work, where a directory's model can't be run.
    """
    if args.model is None:
        _list(as_json=args.json)
        return 0
    from flexport.cli.one_model import as_text, look_at

    facts = look_at(args.model)
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        print(as_text(facts, about(facts["family"])))
    return 0 if facts.get("checkpoint", {"complete": True})["complete"] else 2


def _list(*, as_json: bool) -> None:
    family_rows = [
        {"family": family.model_type, "from": family.source, "about": about(family.model_type)}
        for family in families()
    ]
    model_rows = [_model_row(name) for name in known_names()]
    if as_json:
        print(json.dumps({"families": family_rows, "models": model_rows}, indent=2))
    else:
        print(_as_text(family_rows, model_rows))


def _model_row(name: str) -> dict[str, Any]:
    config = known_config(name)
    assert config is not None, name
    return {"model": name, **summary(spec_of(config))}


def _as_text(family_rows: Sequence[dict[str, Any]], model_rows: Sequence[dict[str, Any]]) -> str:
    families_table = [("FAMILY", "MODELS"), *((row["family"], _about(row)) for row in family_rows)]
    models_table = [
        ("MODEL", "FAMILY", "PARAMETERS", "ACTIVE", "LAYERS", "CONTEXT", "WEIGHTS", "KV A TOKEN"),
        *(
            (
                row["model"],
                row["family"],
                format_count(row["parameters"]),
                _active(row),
                str(row["layers"]),
                str(row["context_tokens"]),
                format_bytes(row["weights_bytes"]),
                format_bytes(row["kv_bytes_per_token"]),
            )
            for row in model_rows
        ),
    ]
    return "\n".join(
        [
            *columns(families_table),
            "",
            *columns(models_table),
            "",
            "Sizes are for 16-bit weights and cache; active parameters are those that a token meets,",
            "where they are not all. Any checkpoint of a family runs from its directory or hub id;",
            "models named here also run without one, on made-up weights, with --load-format dummy.",
            "`flexport models NAME` or `flexport models DIR` shows one model.",
        ]
    )


def _active(row: dict[str, Any]) -> str:
    active = row["active_parameters"]
    return "" if active == row["parameters"] else format_count(active)


def _about(row: dict[str, Any]) -> str:
    added = "" if row["from"] == "flexport" else f"(from {row['from']})"
    return f"{row['about']} {added}".strip()

"""`python -m flexport.bench.flexgen`: a table on stdout, or JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from flexport.bench.flexgen.own import best_policy, same_policy
from flexport.bench.flexgen.published import GEN_LEN, PUBLISHED, Setting
from flexport.bench.flexgen.schedule import times
from flexport.errors import FlexportError
from flexport.models import known_config, spec_of
from flexport.planner.machine import Machine, read_machine

__all__ = ["main"]

T4 = Path(str(resources.files("flexport.planner") / "machines" / "t4.json"))

HEADS = ("model", "prompt", "block", "percent", "run", "published", "predicted", "ratio",
         "flexport", "best", "its block")  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a machine's file is none."""
    parser = argparse.ArgumentParser(
        prog="python -m flexport.bench.flexgen",
        description="FlexGen's published tokens a second, what its schedule comes to on a machine's "
        "numbers (predicted), and what flexport should reach there: with the same policy "
        "(flexport; * needs more memory than there is by flexport's count) and with one of its own "
        "for as many prompts as you like (best).",
    )
    parser.add_argument("--machine", type=Path, default=T4, help="a machine's file (default: a T4)")
    parser.add_argument("--model", help="only runs of this model, e.g. facebook/opt-30b")
    parser.add_argument("--json", action="store_true", help="print a JSON line for each run")
    args = parser.parse_args(arguments)
    try:
        machine = read_machine(args.machine)
        lines = _lines(machine, args.model)
        if args.json:
            for line in lines:
                sys.stdout.write(json.dumps(line) + "\n")
        else:
            for row in _table(lines):
                sys.stdout.write(row + "\n")
    except FlexportError as error:
        sys.stderr.write(f"flexport: {error}\n")
        return 1
    return 0


def _lines(machine: Machine, model: str | None) -> Iterator[dict[str, Any]]:
    for setting in PUBLISHED:
        if model in (None, setting.model):
            yield _line(setting, machine)


def _line(setting: Setting, machine: Machine) -> dict[str, Any]:
    spec = spec_of(known_config(setting.model) or {})
    found = times(spec, setting, machine)
    predicted_tok_s = setting.num_rows * GEN_LEN / found.run_s
    same, best = same_policy(setting, machine), best_policy(setting, machine)
    return {
        "machine": machine.name,
        "setting": asdict(setting),
        "predicted_tok_s": predicted_tok_s,
        "ratio": predicted_tok_s / setting.tok_s,
        "seconds": {"prefill": found.prefill_s, "decode": found.decode_s},
        "parts_seconds": found.parts_s,
        "same": {"tok_s": same.tok_s, "fits": same.fits, "policy": same.policy.to_dict()},
        "best": {"tok_s": best.tok_s, "policy": best.policy.to_dict()},
    }


def _table(lines: Iterator[dict[str, Any]]) -> Iterator[str]:
    rows = [HEADS, *map(_cells, lines)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _cells(line: dict[str, Any]) -> tuple[str, ...]:
    setting, same, best = line["setting"], line["same"], line["best"]
    policy = best["policy"]
    return (
        setting["model"].removeprefix("facebook/"),
        str(setting["prompt_len"]),
        f"{setting['batch_size']} x {setting['num_batches']}",
        " ".join(map(str, setting["percent"])),
        setting["source"],
        f"{setting['tok_s']:.2f}",
        f"{line['predicted_tok_s']:.2f}",
        f"{line['ratio']:.2f}",
        f"{same['tok_s']:.2f}{'' if same['fits'] else '*'}",
        f"{best['tok_s']:.2f}",
        f"{policy['batch_size']} x {policy['num_batches']}",
    )


if __name__ == "__main__":
    sys.exit(main())

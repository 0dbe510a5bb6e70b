"""`flexport bench`: generation throughput on synthetic prompts, and how near the limit it comes."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexport.bench.workload import Workload
from flexport.cli.engine_options import add_engine_arguments, engine_settings, positive
from flexport.cli.progress import show_packing
from flexport.errors import UsageError

if TYPE_CHECKING:
    from flexport.bench.ceilings import Ceilings
    from flexport.models.spec import ModelSpec

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    work = parser.add_argument_group("work")
    for name, default, meaning in (
        ("prompt-len", 128, "tokens of each prompt"),
        ("gen-len", 32, "tokens generated for each prompt; none ends early"),
        ("num-prompts", 64, "prompts of each run"),
        ("repeats", 3, "runs; their median counts. Loading is not counted"),
    ):
        work.add_argument(
            f"--{name}", type=positive, metavar="N", default=default,
            help=f"{meaning} (default: {default})",
        )  # fmt: skip
    work.add_argument(
        "--seed", type=int, metavar="N", default=0, help="of the prompts' tokens (default: 0)"
    )
    shown = parser.add_argument_group("result")
    shown.add_argument(
        "--ceilings",
        metavar="measure|skip|FILE",
        default="measure",
        help="what the machine can do at best, which the run is compared with: measure it after "
        "the runs (about 30 s), skip it, or read it from the JSON that a run before printed "
        "(default: measure)",
    )
    shown.add_argument("--json", action="store_true", help="print one JSON line instead of a table")
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the benchmark and print its result on stdout; returns the exit code."""
    settings = engine_settings(args)
    known_data = _known_ceilings(args.ceilings)
    work = Workload(
        num_prompts=args.num_prompts,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        seed=args.seed,
    )

    from flexport.engine.llm import LLM

    with LLM(
        **settings, on_plan=lambda plan: _say(plan.describe()), show_packing=show_packing
    ) as llm:
        from flexport.bench import job  # and torch, after what can be refused without it

        ceilings = _ceilings_from(known_data) if known_data else None
        reports = job.run_repeats(llm, work, args.repeats, _say)
        peak_bytes = job.process_peak_bytes()
        engine = llm.engine
        spec, device = engine.spec, engine.backend.capabilities.name
        dtype = engine.dtype
    if args.ceilings == "measure":
        ceilings = _measure(args, spec, dtype, reports[0]["backend"])
    found = job.result(reports, work, spec, device=device, peak_bytes=peak_bytes, ceilings=ceilings)
    print(json.dumps(found) if args.json else job.table(found))
    return 0


def _known_ceilings(asked: str) -> dict[str, Any] | None:
    """The ceilings of a file: a result's, or what they are alone."""
    if asked in ("measure", "skip"):
        return None
    try:
        data = json.loads(Path(asked).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--ceilings is measure, skip or a file, and {asked} can't be read: {error.strerror}"
        ) from error
    except ValueError as error:
        raise UsageError(f"--ceilings {asked} is not JSON: {error}") from error
    if isinstance(data, dict):
        data = data.get("ceilings", data)
    if not isinstance(data, dict) or "engine_read" not in data:
        raise UsageError(
            f"--ceilings {asked} holds no ceilings; give it what `flexport bench --json` printed"
        )
    return data


def _ceilings_from(data: dict[str, Any]) -> Ceilings:
    from flexport.bench.ceilings import Ceilings

    try:
        return Ceilings.from_dict(data)
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"--ceilings: not the ceilings of this version: {error!r}") from error


def _measure(args: argparse.Namespace, spec: ModelSpec, dtype: str, backend: str) -> Ceilings:
    from flexport.bench.ceilings import ceilings_for

    directory = Path(args.offload_dir or tempfile.gettempdir())
    return ceilings_for(spec, dtype, backend, directory, _say)


def _say(line: str) -> None:
    print(line if "\n" in line else f"flexport: {line}", file=sys.stderr, flush=True)

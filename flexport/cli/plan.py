"""`flexport plan`: what a run would do and how long it would take, here or on another machine.

Nothing is opened, loaded or computed, and torch is not imported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flexport import demo
from flexport.apps.lengths import sampled
from flexport.cli import frontier as shown
from flexport.cli.engine_options import (
    POLICY_OPTIONS,
    add_engine_arguments,
    engine_settings,
    positive,
)
from flexport.engine.comparison import lane_table
from flexport.engine.limits import budgets_of, default_budgets
from flexport.engine.llm import policy_asked
from flexport.engine.machines import Numbers, machine_here, machine_named
from flexport.engine.plan import Plan
from flexport.engine.planning import Planning, facts_of, job_of
from flexport.engine.source import Source, open_source
from flexport.errors import StorageError, UsageError
from flexport.intake.encode import Encoder
from flexport.planner.footprint import JobSizes
from flexport.planner.search import Gain, Point, frontier, gains
from flexport.policy import Budgets
from flexport.records import SamplingParams
from flexport.registry import describe_backend, open_backend, which_backend
from flexport.tokenizer import TokenCounter

__all__ = ["HELP", "add_arguments", "run"]

HELP = "say what a run would do and how long it would take, here or on another machine"

_STANDARD = "-"
ASKED: Numbers = "asked"
_LENGTHS = {"prompt_len": 128, "gen_len": 32, "num_prompts": 64}
_MAX_TOKENS = 128

_THINGS = {
    "device": "device memory",
    "host": "host memory",
    "disk": "disk",
    "disk_to_host": "reading from disk",
    "host_to_disk": "writing to disk",
    "host_to_device": "the link to the device",
    "device_to_host": "the link back",
}
"""What may be had more of, for people."""

WORTH_TELLING = 1.01
"""How many times the rate it must bring."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    job = parser.add_argument_group("job: rows of a file, or alike ones")
    job.add_argument(
        "-i",
        "--input",
        metavar="FILE|-",
        help="rows as `flexport run` takes them; some of them, spread over the file, say how long "
        "all are",
    )
    job.add_argument(
        "--max-tokens",
        type=positive,
        metavar="TOKENS",
        help="with --input, what rows generate that don't say (default: "
        f"{_MAX_TOKENS}, or what the context has room for)",
    )
    for name, meaning in (
        ("prompt-len", "tokens of each prompt"),
        ("gen-len", "tokens generated for each prompt"),
        ("num-prompts", "prompts"),
    ):
        default = _LENGTHS[name.replace("-", "_")]
        job.add_argument(
            f"--{name}", type=positive, metavar="N", help=f"{meaning} (default: {default})"
        )
    job.add_argument(
        "--machine",
        metavar="FILE|NAME",
        help="plan for another machine: one that `flexport profile` wrote a file of, or one that is "
        "shipped. Its memory is the budget, and no device of this machine is looked for (default: "
        "this machine)",
    )
    result = parser.add_argument_group("result")
    result.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object instead of text, which `flexport run --policy FILE` takes",
    )
    result.add_argument(
        "--frontier",
        action="store_true",
        help="show the best plan of each block size that no other beats in both latency and "
        "throughput",
    )
    result.add_argument(
        "--csv", metavar="FILE|-", help="with --frontier, write it there, as CSV; - is stdout"
    )
    result.add_argument(
        "--plot", metavar="FILE.svg", help="with --frontier, draw it there, as a picture"
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the plan on stdout; returns the exit code."""
    _check(args)
    settings = engine_settings(args)
    policy, choice = policy_asked(
        **{name: settings[name] for name in ("policy", *POLICY_OPTIONS) if name in settings}
    )
    source = open_source(args.model, args.revision, args.load_format or "auto")
    planning, budgets = _planning(args, source)
    job = _job(args, source)
    planning.check_length(job.prompt_tokens, job.new_tokens)
    plan = planning.plan(job, budgets, policy, choice)
    task = planning.task(job, budgets, choice)
    more = gains(task, task.planned(plan.policy)) if policy is None else []
    _show(args, plan, more, frontier(task) if args.frontier else [])
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise UsageError for options that a plan has no use for, or that contradict each other."""
    lengths = [name for name in _LENGTHS if getattr(args, name) is not None]
    here = [name for name in ("backend", "offload_dir") if getattr(args, name) is not None]
    for is_wrong, why in (
        (args.trace, "--trace shows what a run does, and a plan does nothing; use `flexport run`"),
        (
            (args.csv or args.plot) and not args.frontier,
            "--csv and --plot show the frontier; add --frontier",
        ),
        (
            args.frontier and args.policy != "auto",
            "--frontier looks for policies; leave --policy out",
        ),
        (
            args.plot and not args.plot.endswith(".svg"),
            f"--plot {args.plot}: the picture is drawn as SVG; name it FILE.svg",
        ),
        (
            args.json and args.csv == _STANDARD,
            "--json and --csv - would both write to stdout; name a file for one of them",
        ),
        (
            args.machine and here,
            f"{_options(here)} is of this machine, --machine {args.machine} another; leave one out",
        ),
        (
            args.input and lengths,
            f"{_options(lengths)} and --input both say what the rows are; leave one of them out",
        ),
        (
            args.input is None and args.max_tokens,
            "--max-tokens is for rows of --input that don't say; use --gen-len without one",
        ),
    ):
        if is_wrong:
            raise UsageError(why)


def _options(names: list[str]) -> str:
    return ", ".join("--" + name.replace("_", "-") for name in names)


def _planning(args: argparse.Namespace, source: Source) -> tuple[Planning, Budgets]:
    """What makes plans for the machine that is asked for, and the budgets there."""
    asked = (args.device_memory, args.host_memory, args.disk_memory)
    if args.machine is not None:
        machine, numbers = machine_named(args.machine), ASKED
        name, facts, budgets = machine.backend, facts_of(machine), budgets_of(machine, asked)
    else:
        asked_name = args.backend or "auto"
        name = which_backend(asked_name)
        described = describe_backend(asked_name)
        if described is None:  # it can't tell without being opened, or why it can't be
            name, backend = open_backend(asked_name)
            described = backend.capabilities
            backend.close()
        facts = described
        directory = Path(args.offload_dir or tempfile.gettempdir())
        budgets = default_budgets(facts, asked, directory)
        machine, numbers = machine_here(facts, name, directory)
    planning = Planning(
        source, facts, machine, numbers=numbers, backend=name, dtype=args.dtype or "auto"
    )
    return planning, budgets


def _job(args: argparse.Namespace, source: Source) -> JobSizes:
    """The lengths of the rows asked for."""
    path = args.input
    alike = any(getattr(args, name) is not None for name in _LENGTHS)
    if path is None and not alike and (args.model is None or Path(args.model) == demo.MODEL_DIR):
        path = demo.INPUT_PATH
    if path is None:
        lengths = {
            name: default if getattr(args, name) is None else getattr(args, name)
            for name, default in _LENGTHS.items()
        }
        return JobSizes(
            prompt_tokens=lengths["prompt_len"],
            new_tokens=lengths["gen_len"],
            num_rows=lengths["num_prompts"],
        )
    counter = TokenCounter(source.directory)
    encoder = Encoder(
        counter,
        SamplingParams(max_tokens=args.max_tokens or _MAX_TOKENS),
        max_positions=source.spec.max_positions,
        vocab_size=source.spec.vocab_size,
        fallback_max_tokens=_MAX_TOKENS if args.max_tokens is None else None,
    )
    if path == _STANDARD:
        requests, num_rows = sampled(sys.stdin.buffer, encoder)
    else:
        try:
            with Path(path).open("rb") as lines:
                requests, num_rows = sampled(lines, encoder)
        except OSError as error:
            raise UsageError(f"can't read {path}: {error.strerror}") from error
    if not counter.has_vocabulary:
        print(
            f"flexport: {source.name} has no vocabulary here that can be read quickly; a token is "
            "taken to be 4 bytes of text",
            file=sys.stderr,
        )
    return job_of(requests, num_rows)


def _show(args: argparse.Namespace, plan: Plan, more: list[Gain], points: list[Point]) -> None:
    """All that was asked for, on stdout and in files."""
    for option, text in (
        (args.csv, shown.as_csv(points)),
        (args.plot, shown.as_svg(points, f"{plan.model} on {plan.machine.name}") if points else ""),
    ):
        if option == _STANDARD:
            print(text, end="")
        elif option is not None:
            try:
                Path(option).write_text(text, encoding="utf-8")
            except OSError as error:
                raise StorageError(f"can't write {option}: {error.strerror}") from error
    if args.json:
        print(json.dumps(_as_dict(plan, more, points), indent=2))
    elif args.csv != _STANDARD:
        parts = [plan.describe(), lane_table(plan.predicted)]
        if more:
            parts.append(_told(more, plan.predicted.tok_s))
        print("\n\n".join([*parts, shown.as_table(points)] if points else parts))


def _told(more: list[Gain], tok_s: float) -> str:
    """What would make it quicker, and what would not."""
    worth = [gain for gain in more if gain.tok_s >= WORTH_TELLING * tok_s]
    if not worth:
        things = ", ".join(f"{gain.more} of {_THINGS[gain.what]}" for gain in more)
        return f"none of these would bring a per cent: {things}"
    lines = [
        f"  {gain.more} more of {_THINGS[gain.what]}: {gain.tok_s:.3g} tok/s, "
        f"{100 * (gain.tok_s / tok_s - 1):+.0f} %"
        for gain in sorted(worth, key=lambda gain: -gain.tok_s)
    ]
    return "\n".join(["what would bring more:", *lines])


def _as_dict(plan: Plan, more: list[Gain], points: list[Point]) -> dict[str, Any]:
    """The plan, and under "policy" what `flexport run --policy` takes of it."""
    found: dict[str, Any] = {
        "model": plan.model,
        "backend": plan.backend,
        "dtype": plan.dtype,
        "machine": {"name": plan.machine.name, "numbers": plan.numbers},
        **plan.to_dict(),
    }
    if more:
        found["gains"] = [asdict(gain) for gain in more]
    if points:
        found["frontier"] = [
            {"latency_s": latency_s, "tok_s": tok_s, "policy": policy.to_dict()}
            for latency_s, tok_s, policy in points
        ]
    return found

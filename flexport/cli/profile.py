"""`flexport profile`: measure this machine, and keep what was found for later plans."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from flexport.cli.table import columns
from flexport.errors import StorageError, UsageError
from flexport.planner.machine import Computer, Curve, Lane, Machine
from flexport.units import format_bytes, format_rate, parse_bytes

__all__ = ["HELP", "add_arguments", "run"]

HELP = "measure this machine: its disk, its links, its kernels"

LEAST_BYTES = 64 << 20
"""With less memory, what is measured would lie in a processor's caches."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    parser.add_argument(
        "--backend",
        metavar="NAME",
        default="auto",
        help="what to measure, a name of `flexport backends`, NAME:1 for its second device "
        "(default: auto, the best that can be used)",
    )
    parser.add_argument(
        "--offload-dir",
        metavar="DIR",
        help="a folder on the disk to measure, that of your models and runs; a file of 2 GiB, or a "
        "quarter of what is free there, is written to it and removed (default: the system's "
        "temporary directory)",
    )
    parser.add_argument(
        "--memory",
        type=_memory,
        metavar="SIZE",
        default="1GiB",
        help="what measuring may take of device and host memory, beside some 400 MiB for Python and "
        f"torch; at least {format_bytes(LEAST_BYTES)} (default: 1GiB)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the machine file in place of a table"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="also write the machine file there, to plan with elsewhere"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit code."""
    directory = Path(args.offload_dir or tempfile.gettempdir())
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--offload-dir {directory} is a file; name a folder")
    output = None if args.output is None else Path(args.output)
    if output is not None and not output.absolute().parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {output.absolute().parent}")

    from flexport.bench.profile.measure import measure_machine
    from flexport.bench.profile.timing import Effort
    from flexport.engine.known_machine import remember
    from flexport.registry import open_backend

    name, backend = open_backend(args.backend)
    with closing(backend):
        effort = Effort(memory_bytes=args.memory)
        machine = measure_machine(name, backend, directory, effort, _say)
    print(machine.to_json() if args.json else _table(machine))
    if output is not None:
        try:
            output.write_text(machine.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"can't write {output}: {error.strerror or error}") from error
    try:
        _say(f"kept in {remember(machine)}")
    except StorageError as error:  # it was printed, which may be all that is wanted
        _say(str(error))
    return 0


def _table(machine: Machine) -> str:
    """A line a number, with where it comes from."""
    rows = [("WHAT", "VALUE", "SOURCE"), *_lines(machine)]
    shown = columns([(name, value) for name, value, _ in rows], num_words=1)
    lines = [f"{line}  {row[2]}" for line, row in zip(shown, rows, strict=True)]
    return "\n".join([machine.about, "", *lines])


def _lines(machine: Machine) -> Iterator[tuple[str, str, str]]:
    """Name, value and source of each number."""
    source = machine.source_of
    for name in ("device_bytes", "host_bytes", "disk_bytes"):
        yield name, format_bytes(getattr(machine, name)), source(name)
    for name in ("disk_read", "disk_write", "up", "down"):
        lane: Lane | None = getattr(machine, name)
        if lane is not None:
            yield f"{name}.bytes_per_s", format_rate(lane.bytes_per_s), source(name)
            yield f"{name}.copy_s", _short(lane.copy_s), source(name)
    yield "computing_share", f"{machine.computing_share:.2f}", source("computing_share")
    yield "reading_share", f"{machine.reading_share:.2f}", source("reading_share")
    if machine.host is not None:
        yield "crossing_s", _short(machine.crossing_s), source("crossing_s")
    for part, computer in (("device", machine.device), ("host", machine.host)):
        if computer is not None:
            for name, value in _of_computer(computer):
                field = name.partition("[")[0]
                yield f"{part}.{name}", value, source(f"{part}.{field}")


def _of_computer(computer: Computer) -> Iterator[tuple[str, str]]:
    for name in ("products", "streamed_products"):
        curves: dict[str, Curve] = getattr(computer, name)
        for form, curve in curves.items():
            at = ", ".join(f"{rows:g}" for rows in curve.rows)
            rates = ", ".join(f"{rate / 1e9:.0f}" for rate in curve.flops_per_s)
            yield f"{name}[{form}] at {at} rows", f"{rates} GFLOP/s"
    for form, most in computer.direct_rows.items():
        yield f"direct_rows[{form}]", f"{most}"
    for codec, rate in computer.decoded_values_per_s.items():
        yield f"decoded_values_per_s[{codec}]", _billions(rate)
    yield "memory_bytes_per_s", format_rate(computer.memory_bytes_per_s)
    yield "touched_values_per_s", _billions(computer.touched_values_per_s)
    if computer.stepped_values_per_s is not None:
        yield "stepped_values_per_s", _billions(computer.stepped_values_per_s)
    prompt = computer.prompt_attention_flops_per_s
    yield "prompt_attention_flops_per_s", f"{prompt / 1e9:.0f} GFLOP/s"
    for queries, rate in computer.cache_bytes_per_s.items():
        yield f"cache_bytes_per_s[{queries}]", format_rate(rate)
    for name in ("unpacked_bytes_per_s", "packed_bytes_per_s"):
        by_codec: dict[str, float] = getattr(computer, name)
        for codec, rate in by_codec.items():
            yield f"{name}[{codec}]", format_rate(rate)
    yield "sampled_values_per_s", _billions(computer.sampled_values_per_s)
    yield "laid_out_values_per_s", _billions(computer.laid_out_values_per_s)
    for name in ("visit_s", "piece_s", "page_s"):
        yield name, _short(getattr(computer, name))


def _billions(per_s: float) -> str:
    return "as they come" if per_s == float("inf") else f"{per_s / 1e9:.2f} G/s"


def _short(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us"


def _memory(text: str) -> int:
    try:
        num_bytes = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if num_bytes < LEAST_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text!r} is too little to measure with; give {format_bytes(LEAST_BYTES)} or more"
        )
    return num_bytes


def _say(line: str) -> None:
    print(f"flexport: {line}", file=sys.stderr, flush=True)

"""Predicted beside measured, for policies of all kinds: `python -m flexport.bench.predictions`.

Each case is a job under a policy of its own: in memory, streamed, with the cache on disk,
compressed, in blocks of several shapes, with rows of all lengths, on two families. A device with
memory of its own has other cases, of weights and cache at home on the host. What is predicted is
by the numbers that `flexport profile` measured on this machine; without them stderr says whose
they are, and the table should not be trusted. Weights are made up, and nothing is fitted to the
cases.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flexport.bench.cases import Case, arguments, is_asked_for, ran, row, write

__all__ = ["BESIDE_CASES", "CASES", "main"]

LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
OPT = "facebook/opt-1.3b"

BOUND = 0.15
"""What a prediction may be off by."""

NOTHING = (0, 0, 100, 0, 100, 0)
"""Weights on disk, all else in memory."""


def _block(batch_size: int, num_batches: int = 1, **more: Any) -> dict[str, Any]:
    return {"batch_size": batch_size, "num_batches": num_batches, **more}


_llama = partial(Case, model=LLAMA, rows=64, prompt=(128, 128), new=24)
_opt = partial(Case, model=OPT, rows=32, prompt=(128, 128), new=24)
_small = partial(Case, model="facebook/opt-125m", dtype="float32", rows=32, prompt=(32, 32), new=16)

CASES = (
    _llama(name="in memory, 1 x 64", settings=_block(64)),
    _llama(name="in memory, 4 x 8", rows=32, settings=_block(8, 4)),
    _llama(name="in memory, prompts of 16 to 240 tokens", prompt=(16, 240), settings=_block(16, 4)),
    _llama(
        name="in memory, 8 rows of 400 + 48", rows=8, prompt=(400, 400), new=48, settings=_block(8)
    ),
    _llama(name="weights on disk, 1 x 8", rows=8, settings=_block(8, percent=NOTHING)),
    _llama(name="weights on disk, 1 x 64", settings=_block(64, percent=NOTHING)),
    _llama(
        name="weights 30 % in memory, paced 8 x 8",
        rows=96,
        settings=_block(8, 8, sweep_tokens=232, percent=(30, 0, 100, 0, 100, 0)),
    ),
    _llama(name="cache on disk, 4 x 16", settings=_block(16, 4, percent=(100, 0, 0, 0, 100, 0))),
    _llama(
        name="half of all on disk, 4 x 16",
        settings=_block(16, 4, percent=(50, 0, 50, 0, 50, 0)),
    ),
    _llama(name="int8 weights, 1 x 64", settings=_block(64, compress_weights="int8")),
    _llama(
        name="int4 weights on disk, 1 x 16",
        rows=16,
        settings=_block(16, compress_weights="int4", percent=NOTHING),
    ),
    _llama(name="int4 cache, 1 x 32", rows=32, settings=_block(32, compress_cache="int4")),
    _opt(name="OPT, in memory, 1 x 32", settings=_block(32)),
    _opt(
        name="OPT, weights 20 % in memory, cache on disk, 2 x 16",
        settings=_block(16, 2, percent=(20, 0, 0, 0, 100, 0)),
    ),
)

BESIDE_CASES = (
    _small(name="all on the device, 1 x 32", settings=_block(32, percent=(100, 0, 100, 0, 100, 0))),
    _small(
        name="weights on the host, 1 x 32", settings=_block(32, percent=(0, 100, 100, 0, 100, 0))
    ),
    _small(
        name="half of the weights on the host, 4 x 8",
        settings=_block(8, 4, percent=(50, 50, 100, 0, 100, 0)),
    ),
    _small(
        name="cache on the host, 2 x 16",
        settings=_block(16, 2, percent=(100, 0, 0, 100, 100, 0), cpu_attention="off"),
    ),
    _small(
        name="cache on the host and attended to there, 2 x 16",
        settings=_block(16, 2, percent=(100, 0, 0, 100, 100, 0), cpu_attention="on"),
    ),
    _small(
        name="all on the host, prompts of 4 to 60 tokens, 4 x 8",
        prompt=(4, 60),
        settings=_block(8, 4, percent=(0, 100, 0, 100, 0, 100), cpu_attention="off"),
    ),
)
"""Of a device with memory of its own."""


def measure(case: Case, backend: str, repeats: int, directory: Path) -> dict[str, Any]:
    """The case's prediction, and how long it took: the median of `repeats` runs."""
    plan, runs = ran(case, backend, directory, repeats)
    rates = [run["throughput"]["generation_tok_s"] for run in runs]
    middle = sorted(runs, key=lambda run: run["throughput"]["generation_tok_s"])[len(runs) // 2]
    return {
        "case": case.name,
        "machine": plan.machine.name,
        "numbers": plan.numbers,
        "predicted_tok_s": plan.predicted.tok_s,
        "measured_tok_s": statistics.median(rates),
        "all_tok_s": rates,
        "comparison": middle["comparison"],
    }


def _line(found: dict[str, Any]) -> str:
    """The case as a line of a table."""
    predicted, measured = found["predicted_tok_s"], found["measured_tok_s"]
    off = predicted / measured - 1
    return row(
        found["case"],
        f"{predicted:.1f}",
        f"{measured:.1f}",
        f"{100 * off:+.0f} %" + ("" if abs(off) <= BOUND else ", too much"),
        found["comparison"]["predicted"]["limited_by"],
    )


def _results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in CASES if args.unified else BESIDE_CASES:
        if is_asked_for(args, case):
            sys.stderr.write(f"{case.name} ...\n")
            yield measure(case, args.backend, args.repeats, args.dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and print the table, or a JSON line for each."""
    args = arguments("Predicted beside measured.", argv)
    if not args.json:
        write("| case | predicted tok/s | measured | off by | limited by |")
        write("|---|---|---|---|---|")
    whose = ""
    for found in _results(args):
        if whose != found["numbers"]:
            whose = found["numbers"]
            sys.stderr.write(f"by numbers that are {whose}, those of {found['machine']}\n")
        write(json.dumps(found) if args.json else _line(found))


if __name__ == "__main__":
    main()

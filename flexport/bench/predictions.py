"""Predicted beside measured, for policies of all kinds: `python -m flexport.bench.predictions`.

Each case is a job under a policy of its own: in memory, streamed, with the cache on disk,
compressed, in blocks of several shapes, with rows of all lengths, on two families. What is
predicted is by the numbers that `flexport profile` measured on this machine; without them the
table says whose they are, and should not be trusted. Weights are made up, and nothing is fitted
to the cases.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexport import process

__all__ = ["CASES", "Case", "main"]

LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
OPT = "facebook/opt-1.3b"

BOUND = 0.15
"""What a prediction may be off by."""

NOTHING = (0, 0, 100, 0, 100, 0)
"""Weights on disk, all else in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A job under a policy."""

    name: str
    model: str = LLAMA
    rows: int = 64
    prompt: tuple[int, int] = (128, 128)
    """Shortest and longest prompt, in tokens."""
    new: int = 24
    settings: dict[str, Any] = field(default_factory=dict)
    """Arguments of `flexport.LLM`."""

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each row."""
        draw = random.Random(0)
        lengths = [draw.randint(*self.prompt) for _ in range(self.rows)]
        return [[draw.randrange(4, vocab_size) for _ in range(length)] for length in lengths]


def _block(batch_size: int, num_batches: int = 1, **more: Any) -> dict[str, Any]:
    return {"batch_size": batch_size, "num_batches": num_batches, **more}


CASES = (
    Case(name="in memory, 1 x 64", settings=_block(64)),
    Case(name="in memory, 4 x 8", rows=32, settings=_block(8, 4)),
    Case(name="in memory, prompts of 16 to 240 tokens", prompt=(16, 240), settings=_block(16, 4)),
    Case(
        name="in memory, 8 rows of 400 + 48", rows=8, prompt=(400, 400), new=48, settings=_block(8)
    ),
    Case(name="weights on disk, 1 x 8", rows=8, settings=_block(8, percent=NOTHING)),
    Case(name="weights on disk, 1 x 64", settings=_block(64, percent=NOTHING)),
    Case(
        name="weights 30 % in memory, paced 8 x 8",
        rows=96,
        settings=_block(8, 8, sweep_tokens=232, percent=(30, 0, 100, 0, 100, 0)),
    ),
    Case(name="cache on disk, 4 x 16", settings=_block(16, 4, percent=(100, 0, 0, 0, 100, 0))),
    Case(
        name="half of all on disk, 4 x 16",
        settings=_block(16, 4, percent=(50, 0, 50, 0, 50, 0)),
    ),
    Case(name="int8 weights, 1 x 64", settings=_block(64, compress_weights="int8")),
    Case(
        name="int4 weights on disk, 1 x 16",
        rows=16,
        settings=_block(16, compress_weights="int4", percent=NOTHING),
    ),
    Case(name="int4 cache, 1 x 32", rows=32, settings=_block(32, compress_cache="int4")),
    Case(name="OPT, in memory, 1 x 32", model=OPT, rows=32, settings=_block(32)),
    Case(
        name="OPT, weights 20 % in memory, cache on disk, 2 x 16",
        model=OPT,
        rows=32,
        settings=_block(16, 2, percent=(20, 0, 0, 0, 100, 0)),
    ),
)


def measure(case: Case, repeats: int, models: Path, offload_dir: Path) -> dict[str, Any]:
    """The case's prediction, and how long it took: the median of `repeats` runs after a short one."""
    from flexport import LLM, SamplingParams
    from flexport.bench.checkpoint import shared_checkpoint

    model = shared_checkpoint(case.model, "bfloat16", models)
    with LLM(model, offload_dir=offload_dir, **case.settings) as llm:
        prompts = case.prompts(llm.vocab_size)
        llm.generate(prompts[: case.settings["batch_size"]], SamplingParams(max_tokens=2))
        runs = []
        for _ in range(repeats):
            llm.generate(prompts, SamplingParams(max_tokens=case.new, ignore_eos=True))
            runs.append(llm.report)
        assert llm.plan is not None
        rates = [run["throughput"]["generation_tok_s"] for run in runs]
        middle = sorted(runs, key=lambda run: run["throughput"]["generation_tok_s"])[len(runs) // 2]
        return {
            "case": case.name,
            "machine": llm.plan.machine.name,
            "numbers": llm.plan.numbers,
            "predicted_tok_s": llm.plan.predicted.tok_s,
            "measured_tok_s": statistics.median(rates),
            "all_tok_s": rates,
            "comparison": middle["comparison"],
        }


def _line(found: dict[str, Any]) -> str:
    """The case as a line of a table."""
    predicted, measured = found["predicted_tok_s"], found["measured_tok_s"]
    off = predicted / measured - 1
    cells = (
        found["case"],
        f"{predicted:.1f}",
        f"{measured:.1f}",
        f"{100 * off:+.0f} %" + ("" if abs(off) <= BOUND else ", too much"),
        found["comparison"]["predicted"]["limited_by"],
    )
    return f"| {' | '.join(cells)} |"


def _results(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    for case in CASES:
        if any(word in case.name for word in args.only or [""]):
            sys.stderr.write(f"{case.name} ...\n")
            yield measure(case, args.repeats, args.dir / "models", args.dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the cases and print the table, or a JSON line for each."""
    process.prepare()
    parser = argparse.ArgumentParser(description="Predicted beside measured.")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each case (default: 3)")
    parser.add_argument("--only", action="append", help="cases that have this text; repeatable")
    parser.add_argument("--json", action="store_true", help="a JSON line for each case")
    parser.add_argument(
        "--dir", type=Path, default=Path(tempfile.gettempdir()) / "flexport-bench",
        help="where models are made and tensors spilled (default: in the temporary directory)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    args.dir.mkdir(parents=True, exist_ok=True)
    if not args.json:
        _print("| case | predicted tok/s | measured | off by | limited by |")
        _print("|---|---|---|---|---|")
    for found in _results(args):
        _print(json.dumps(found) if args.json else _line(found))


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

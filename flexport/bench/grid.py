"""The chosen policy beside the best of a grid of policies: `python -m flexport.bench.grid`.

The grid is a coarse one of all there is to choose: rows in flight, rows of a batch, pacing, shares
of weights and cache in quarters and halves, attention on the CPU. What does not fit the budgets is
left out, and what leaves room for the next step. All others are run, however bad they are
predicted to be.

A machine is not as fast in one minute as in another, so the chosen policy is run again and
again in between, and each policy is judged by its neighbours. Those that come out best are then run
in turn with the chosen one, and of these runs the medians count.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from flexport.bench.cases import Case, arguments, is_asked_for, ran, row, write
from flexport.engine.limits import default_budgets
from flexport.engine.machines import machine_here
from flexport.engine.planning import Planning
from flexport.engine.source import open_source
from flexport.planner.search import choose
from flexport.planner.shapes import paced_tokens
from flexport.planner.task import Planned, Task
from flexport.policy import Policy, Split
from flexport.registry import open_backend
from flexport.units import parse_bytes

__all__ = ["BESIDE_SETTINGS", "SETTINGS", "Found", "grid", "main"]

BATCH_ROWS, PACED_ROWS = 16, 8
"""Of a batch, where a block has several: step by step, and paced."""

BLOCK_ROWS = (16, 48)
"""Rows in flight; besides these, all rows of the job."""

EVERY = 3
"""Policies of the grid that are run between two runs of the chosen one."""

FINALISTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A job and what it may take."""

    case: Case
    device_memory: str
    host_memory: str | None = None

    @property
    def memory(self) -> dict[str, str]:
        """As arguments of `flexport.LLM`."""
        found = {"device_memory": self.device_memory, "host_memory": self.host_memory}
        return {name: size for name, size in found.items() if size is not None}


_LLAMA = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"

SETTINGS = (
    Setting(
        case=Case(name="in memory", model=_LLAMA, rows=64, prompt=(64, 64), new=12),
        device_memory="8GiB",
    ),
    Setting(
        case=Case(name="weights twice the memory", model=_LLAMA, rows=96, prompt=(64, 64), new=12),
        device_memory="1GiB",
    ),
    Setting(
        case=Case(
            name="weights and cache twice the memory",
            model="facebook/opt-1.3b",
            rows=32,
            prompt=(200, 200),
            new=12,
        ),
        device_memory="2GiB",
    ),
)
"""Of a device whose memory is the host's."""

_small = Case(
    name="a device that holds half of the weights",
    model="facebook/opt-125m",
    dtype="float32",
    rows=48,
    prompt=(32, 32),
    new=16,
)

BESIDE_SETTINGS = (Setting(case=_small, device_memory="400MiB", host_memory="8GiB"),)
"""Of one that has memory of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A policy, what was predicted for it, and what it reached."""

    policy: Policy
    predicted_tok_s: float
    measured_tok_s: float
    of_chosen: float
    """Its rate by the chosen policy's shortly before and after."""


# ---- the grid


def grid(task: Task) -> list[Policy]:
    """The coarse grid's policies that fit, but for those that leave room for another one's step."""
    policies: list[Policy] = []
    for block in _blocks(task):
        fitting = [
            replace(block, weights=weights, cache=cache)
            for weights, cache in product(_splits(task, 4), _splits(task, 2))
            if task.fits(replace(block, weights=weights, cache=cache))
            # Beside a device that has the whole cache the CPU has nothing to attend to.
            and not (block.cpu_attention and cache.device == 1)
        ]
        policies += [
            policy for policy in fitting if not any(_holds_more(other, policy) for other in fitting)
        ]
    return policies


def _blocks(task: Task) -> Iterator[Policy]:
    job = task.job
    assert job.num_rows is not None
    attends = (False,) if task.machine.unified else (False, True)
    for rows in sorted({*(rows for rows in BLOCK_ROWS if rows < job.num_rows), job.num_rows}):
        for batch_rows, cpu_attention in product(sorted({min(BATCH_ROWS, rows), rows}), attends):
            yield Policy(
                batch_size=batch_rows,
                num_batches=math.ceil(rows / batch_rows),
                cpu_attention=cpu_attention,
            )
        paced_batches = rows // PACED_ROWS
        if paced_batches > 2 and rows < job.num_rows:
            yield Policy(
                batch_size=PACED_ROWS,
                num_batches=paced_batches,
                sweep_tokens=paced_tokens(job, PACED_ROWS, paced_batches),
            )


def _splits(task: Task, parts: int) -> list[Split]:
    """Shares of the device, and the rest where it goes next."""
    shares = [part / parts for part in range(parts + 1)]
    if task.machine.unified:
        return [Split(device=share, disk=1 - share) for share in shares]
    return [Split(device=share, host=1 - share) for share in shares]


def _holds_more(other: Policy, policy: Policy) -> bool:
    """Whether there is no less of weights and cache on the device, and more of one."""
    pairs = [(other.weights, policy.weights), (other.cache, policy.cache)]
    return other != policy and all(first.device >= second.device for first, second in pairs)


# ---- running


def judge(setting: Setting, backend: str, directory: Path, repeats: int) -> Iterator[Found]:
    """Run the setting's grid; the chosen policy comes first, and the finalists' medians last."""
    task = _task(setting, backend, directory)
    chosen = choose(task)

    def run(policy: Policy) -> float:
        case = replace(setting.case, settings={"policy": policy, **setting.memory})
        _, (report,) = ran(case, backend, directory)
        return float(report["throughput"]["generation_tok_s"])

    def found(planned: Planned, rate: float, chosen_rate: float) -> Found:
        return Found(
            policy=planned.policy,
            predicted_tok_s=planned.predicted.tok_s,
            measured_tok_s=rate,
            of_chosen=rate / chosen_rate,
        )

    before = run(chosen.policy)
    yield found(chosen, before, before)
    listed, policies = [], grid(task)
    for at in range(0, len(policies), EVERY):
        some = [task.planned(policy) for policy in policies[at : at + EVERY]]
        rates = [run(planned.policy) for planned in some]
        after = run(chosen.policy)
        for planned, rate in zip(some, rates, strict=True):
            listed.append((planned, found(planned, rate, (before + after) / 2)))
            yield listed[-1][1]
        before = after
    listed.sort(key=lambda pair: -pair[1].of_chosen)
    finalists = [chosen, *(planned for planned, _ in listed[:FINALISTS])]
    turns = [[run(planned.policy) for planned in finalists] for _ in range(repeats)]
    medians = [statistics.median(rates) for rates in zip(*turns, strict=True)]
    for planned, rate in zip(finalists, medians, strict=True):
        yield found(planned, rate, medians[0])


def _task(setting: Setting, backend: str, directory: Path) -> Task:
    name, device = open_backend(backend)
    facts = device.capabilities
    device.close()
    case = setting.case
    source = open_source(str(case.checkpoint(directory / "models")), None, "auto")
    machine, numbers = machine_here(facts, name, directory)
    planning = Planning(source, facts, machine, numbers=numbers, backend=name, dtype=case.dtype)
    device_bytes, host_bytes = (
        None if size is None else parse_bytes(size)
        for size in (setting.device_memory, setting.host_memory)
    )
    budgets = default_budgets(facts, (device_bytes, host_bytes, None), directory)
    return planning.task(case.job, budgets)


# ---- showing


def _described(policy: Policy) -> str:
    parts = [f"{policy.num_batches} x {policy.batch_size}"]
    if policy.sweep_tokens:
        parts[0] += " paced"
    for name, split in (("weights", policy.weights), ("cache", policy.cache)):
        away = "host" if split.host else "disk"
        if split.device < 1:
            parts.append(f"{100 * (1 - split.device):.0f} % of {name} on {away}")
    if policy.cpu_attention:
        parts.append("CPU attends")
    return ", ".join(parts)


def _line(found: Found) -> str:
    return row(
        _described(found.policy),
        f"{found.predicted_tok_s:.1f}",
        f"{found.measured_tok_s:.1f}",
        f"{found.of_chosen:.2f}",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the settings and print a table of each, or a JSON line for each policy."""
    args = arguments("The chosen policy beside the best of a grid.", argv)
    for setting in SETTINGS if args.unified else BESIDE_SETTINGS:
        if not is_asked_for(args, setting.case):
            continue
        results = []
        for found in judge(setting, args.backend, args.dir, args.repeats):
            results.append(found)
            sys.stderr.write(f"{setting.case.name}: {_line(found)}\n")
            if args.json:
                data: dict[str, Any] = {
                    "setting": setting.case.name,
                    "policy": found.policy.to_dict(),
                    "predicted_tok_s": found.predicted_tok_s,
                    "measured_tok_s": found.measured_tok_s,
                    "of_chosen": found.of_chosen,
                }
                write(json.dumps(data))
        if not args.json:
            write(_table(setting, results))


def _table(setting: Setting, results: Sequence[Found]) -> str:
    """The chosen policy, the grid from best to worst, and the final."""
    chosen, *others = results
    final = others[-(1 + FINALISTS) :]
    tried = sorted(others[: -len(final)], key=lambda found: -found.of_chosen)
    head = ["| policy | predicted tok/s | measured | of the chosen |", "|---|---|---|---|"]
    return "\n".join(
        [
            f"{setting.case.name}: the chosen one, and the grid\n",
            *head,
            *map(_line, [chosen, *tried]),
            f"\n{setting.case.name}: the best of them in turn, medians\n",
            *head,
            *map(_line, final),
            "",
        ]
    )


if __name__ == "__main__":
    main()

"""What is left when two things go on at once, and what it costs to wait for each other."""

from __future__ import annotations

import json
import statistics
import tempfile
from contextlib import closing
from pathlib import Path

import flexport
from flexport.backend import Backend
from flexport.bench.profile.layers import DEPTH, Unpacked, open_layers, write_layers
from flexport.bench.profile.timing import Effort, seconds_of
from flexport.bench.profile.visits import STEP_PROMPT
from flexport.bench.spread import Spread
from flexport.engine.host_compute import HostCompute
from flexport.planner.machine import Lane
from flexport.policy import Budgets, Split
from flexport.store.store import Store
from flexport.torch_ops import torch_dtype

__all__ = ["crossing_cost", "shares"]

ROUNDS = 3

STEP_ROWS = 32
"""Of decode steps that take less time to compute than their weights take to come, so that the disk
never rests."""

CROSSING_FEATURES = 2048


def shares(
    backend: Backend, dtype: str, directory: Path, disk_read: Lane, effort: Effort
) -> tuple[Spread, Spread]:
    """Shares of the device's rates beside the disk's full rate, and of the disk's beside computing.

    Decode steps with weights that stay are set beside the same with weights that stream: what
    reads disturb is less the large products than all that is short, and starts and ends together.
    """
    with tempfile.TemporaryDirectory(prefix="flexport-profile-", dir=directory) as folder:
        write_layers(dtype, Path(folder), effort)
        alone_s, _ = _steps(backend, dtype, Path(folder), Split(), effort)
        beside_s, rates = _steps(backend, dtype, Path(folder), Split(device=0.0, disk=1.0), effort)
    visit_s = statistics.fmean(alone_s)
    return (
        Spread.of([min(1.0, visit_s / each_s) for each_s in beside_s]),
        Spread.of([min(1.0, rate / disk_read.bytes_per_s) for rate in rates]),
    )


def _steps(
    backend: Backend, dtype: str, folder: Path, weights: Split, effort: Effort
) -> tuple[list[float], list[float]]:
    """Of each round, seconds of computing of a layer's visit, and bytes a second of the disk's lane."""
    policy = flexport.Policy(weights=weights, batch_size=STEP_ROWS, num_batches=1)
    sampling = flexport.SamplingParams(max_tokens=effort.decode_steps, ignore_eos=True)
    rounds, trace, rates = min(ROUNDS, effort.rounds), folder / "trace.json", []
    with closing(open_layers(Unpacked(backend), dtype, folder, policy, effort, trace)) as llm:
        for _ in range(1 + rounds):
            llm.generate([[5] * STEP_PROMPT] * STEP_ROWS, sampling)
            busy_s, moved = llm.report["busy_seconds"], llm.report["moved_bytes"]
            rates.append(moved["disk_to_host"] / max(busy_s["disk_to_host"], 1e-9))
    # The embedding waits for rows of its table, and the head for the whole of its matrix.
    names = {f"layer {layer}, batch 0" for layer in range(1, DEPTH + 1)}
    events = json.loads(trace.read_text(encoding="utf-8"))
    taken_s = [
        event["dur"] / 1e6
        for event in events
        if event.get("cat") == "compute" and event["name"] in names
    ]
    size = len(taken_s) // (1 + rounds)
    # The first job loads.
    of_rounds = [taken_s[at * size : (at + 1) * size] for at in range(1, 1 + rounds)]
    return [statistics.fmean(each) for each in of_rounds], rates[1:]


def crossing_cost(
    backend: Backend, cpu: Backend, dtype: str, directory: Path, effort: Effort
) -> Spread:
    """Seconds from a device tensor by way of the CPU beside it to what the device computes next."""
    num_bytes = 1 << 20
    budgets = Budgets(device_bytes=num_bytes, host_bytes=num_bytes, disk_bytes=0)
    x_TD = backend.allocate((1, CROSSING_FEATURES), torch_dtype(dtype)).fill_(1.0)
    with Store(backend, budgets, directory) as store, closing(HostCompute(cpu, store)) as host:

        def there_and_back() -> None:
            crossing = host.send([x_TD])
            (arrived,) = crossing.receive()
            host.bring(arrived, x_TD)
            crossing.release()
            x_TD.mul_(1.0)

        both = seconds_of(backend, there_and_back, effort.kernel_s, effort.rounds)
        alone = seconds_of(backend, lambda: x_TD.mul_(1.0), effort.kernel_s, effort.rounds)
    return Spread.of([max(0.0, each_s - alone.median) for each_s in both.values])

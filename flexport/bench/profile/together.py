"""What is left when two things go on at once, and what it costs to wait for each other."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from flexport.backend import Backend
from flexport.bench.profile.kernels import multiplying
from flexport.bench.profile.lanes import DiskFile
from flexport.bench.profile.timing import Effort, seconds_of
from flexport.bench.spread import Spread
from flexport.engine.host_compute import HostCompute
from flexport.policy import Budgets
from flexport.store.store import Store
from flexport.torch_ops import torch_dtype

__all__ = ["crossing_cost", "shares"]

ROUNDS = 3

CROSSING_FEATURES = 2048


def shares(backend: Backend, disk: DiskFile, dtype: str, effort: Effort) -> tuple[Spread, Spread]:
    """Shares of the product rate beside the disk's full rate, and of the reading rate beside products.

    Each is taken next to what it is a share of, so that a machine that slows down shows in both.
    """
    computing, reading = [], []
    seconds = effort.disk_s / 2
    products = multiplying(backend, dtype, effort)
    _rate(products, seconds / 4)
    for _ in range(ROUNDS):
        alone = _rate(products, seconds)
        read_alone = disk.read(disk.bundle_bytes, seconds)
        found: list[float] = []
        over = threading.Event()

        def read(found: list[float] = found, over: threading.Event = over) -> None:
            found.append(disk.read(disk.bundle_bytes, 1e9, over.is_set))

        reader = threading.Thread(target=read, name="flexport profile reads")
        reader.start()
        try:
            beside = _rate(products, seconds)
        finally:
            over.set()
            reader.join()
        computing.append(min(1.0, beside / alone))
        reading.append(min(1.0, found[0] / read_alone))
    return Spread.of(computing), Spread.of(reading)


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


def _rate(products: Iterator[float], seconds: float) -> float:
    """Operations a second."""
    flops, started_s = 0.0, time.perf_counter()
    while not flops or time.perf_counter() - started_s < seconds:
        flops += next(products)
    return flops / (time.perf_counter() - started_s)

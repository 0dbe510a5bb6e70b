"""What this machine can do at best: its disk, its matrix kernels, its memory.

A run is judged by these numbers, so they are taken on the same machine at the same time, and each
is the best that several ways of doing it reach:

- disk: a fresh file, read past the page cache by the engine's own lanes and, to keep those honest,
  by a loop of a few lines that shares no code with them;
- matrices: the backend's product with the model's own shapes, plain and packed, at several
  numbers of rows;
- memory: reading a large tensor, and copying one.

Dimension key: T rows, D features in, F features out, B bytes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexport.backend import Backend, PacksWeights
from flexport.bench.spread import Spread
from flexport.models.spec import ModelSpec
from flexport.models.tensors import layer_tensors, num_parameters
from flexport.policy import Budgets
from flexport.registry import open_backend
from flexport.store.store import FileRun, Lease, Store
from flexport.torch_ops import torch_dtype

__all__ = [
    "Ceilings",
    "MatrixRate",
    "ceilings_for",
    "fresh_file",
    "matrix_rate",
    "measure_ceilings",
]

ROUNDS = 3
"""Measurements of each kind; the median counts."""

DISK_S = 3.0
"""Length of one disk measurement: long enough for a disk's own cache to be out of it."""

MAX_DISK_BYTES = 4 << 30
"""The file is as large as the weights, but no larger than this."""

MATRIX_ROWS = (16, 64, 256, 1024, 2048)
"""From a decode step to a visit of a prefill."""

MATRIX_S = 0.25
MEMORY_BYTES = 512 << 20
MEMORY_S = 0.5

_RUN_BYTES = 64 << 20
"""What is fetched at once: about a layer's weights."""

_LOOP_BYTES = 8 << 20
_LOOP_THREADS = (1, 4, 8)
_O_DIRECT: int = getattr(os, "O_DIRECT", 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRate:
    """The best product that was found."""

    flops_per_s: float
    rows: int
    shape: tuple[int, int]
    """Features out and in."""
    packed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """Rates of one machine, in bytes or operations a second."""

    backend: str
    dtype: str
    engine_read: Spread
    """The engine's lanes, in bytes a second."""
    plain_read: Spread | None
    """The independent loop; None where the platform has no reads past the page cache."""
    matrix: MatrixRate
    memory_read_bytes_per_s: float
    memory_copy_bytes_per_s: float
    """Bytes copied; twice as many cross the memory bus."""

    @property
    def disk_bytes_per_s(self) -> float:
        """The faster of the two ways to read."""
        plain = self.plain_read.median if self.plain_read else 0.0
        return max(self.engine_read.median, plain)

    @property
    def flops_per_s(self) -> float:
        """The best matrix rate."""
        return self.matrix.flops_per_s

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` takes it."""
        return {
            "disk_bytes_per_s": self.disk_bytes_per_s,
            "flops_per_s": self.flops_per_s,
            **asdict(self),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Ceilings:
        """What `to_dict` gave."""
        plain = data["plain_read"]
        shape = data["matrix"]["shape"]
        return cls(
            backend=data["backend"],
            dtype=data["dtype"],
            engine_read=Spread.from_dict(data["engine_read"]),
            plain_read=None if plain is None else Spread.from_dict(plain),
            matrix=MatrixRate(**{**data["matrix"], "shape": (shape[0], shape[1])}),
            memory_read_bytes_per_s=data["memory_read_bytes_per_s"],
            memory_copy_bytes_per_s=data["memory_copy_bytes_per_s"],
        )


def ceilings_for(
    spec: ModelSpec,
    dtype: str,
    backend: str,
    directory: Path,
    say: Callable[[str], None] = lambda _: None,
) -> Ceilings:
    """The ceilings for a model: a file as large as its weights, its own matrix shapes."""
    _, opened = open_backend(backend)
    weight_bytes = num_parameters(spec) * torch_dtype(dtype).itemsize
    directory.mkdir(parents=True, exist_ok=True)
    try:
        return measure_ceilings(
            opened, spec, dtype, directory, disk_bytes=min(weight_bytes, MAX_DISK_BYTES), say=say
        )
    finally:
        opened.close()


def measure_ceilings(
    backend: Backend,
    spec: ModelSpec,
    dtype: str,
    directory: Path,
    *,
    disk_bytes: int,
    disk_s: float = DISK_S,
    say: Callable[[str], None] = lambda _: None,
) -> Ceilings:
    """All ceilings. Writes a file of `disk_bytes` to `directory` and removes it."""
    say(f"measuring ceilings: the disk of {directory}")
    path = directory / f"flexport-ceiling-{os.getpid()}"
    try:
        fresh_file(path, disk_bytes)
        engine_read = Spread.of([_engine_read(backend, path, disk_s) for _ in range(ROUNDS)])
        plain_read = _plain_read(path, disk_s)
    finally:
        path.unlink(missing_ok=True)
    say("measuring ceilings: matrix products and memory")
    return Ceilings(
        backend=backend.capabilities.name,
        dtype=dtype,
        engine_read=engine_read,
        plain_read=plain_read,
        matrix=matrix_rate(backend, _shapes(spec), torch_dtype(dtype)),
        memory_read_bytes_per_s=_memory_read(backend),
        memory_copy_bytes_per_s=_memory_copy(backend),
    )


# ---- disk


def fresh_file(path: Path, num_bytes: int) -> None:
    """A file of random bytes that no cache holds: a disk or file system may compress zeros."""
    block = os.urandom(1 << 20) * 8
    with path.open("wb") as file:
        left_bytes = num_bytes
        while left_bytes > 0:
            left_bytes -= file.write(block[:left_bytes])
        file.flush()
        os.fsync(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _engine_read(backend: Backend, path: Path, seconds: float) -> float:
    """Bytes a second of a store that streams the file, two fetches under way at a time."""
    total_bytes = path.stat().st_size
    run_bytes = min(_RUN_BYTES, total_bytes)
    staging_bytes = 4 * run_bytes
    budgets = Budgets(device_bytes=staging_bytes, host_bytes=staging_bytes, disk_bytes=0)
    with Store(backend, budgets, path.parent) as store:
        kept = [
            store.keep_file("ceiling", [FileRun(path=path, offset_bytes=at, num_bytes=run_bytes)])
            for at in range(0, total_bytes - run_bytes + 1, run_bytes)
        ]
        for run in kept[:2]:  # the first touch of the staging buffers is not the disk's doing
            _release(store.fetch(run))
        moved_bytes, index = 0, 0
        ahead = deque([store.fetch(kept[0])])
        started_s = time.perf_counter()
        while time.perf_counter() - started_s < seconds:
            index += 1
            ahead.append(store.fetch(kept[index % len(kept)]))
            _release(ahead.popleft())
            moved_bytes += run_bytes
        _release(ahead.popleft())
        moved_bytes += run_bytes
        return moved_bytes / (time.perf_counter() - started_s)


def _release(lease: Lease) -> None:
    lease.ticket.join()
    lease.release()


def _plain_read(path: Path, seconds: float) -> Spread | None:
    """The best of a few numbers of threads, each reading its own blocks of the file in turn."""
    if not _O_DIRECT or not hasattr(os, "preadv"):
        return None
    found = []
    for num_threads in _LOOP_THREADS:
        try:
            rates = [_loop_rate(path, num_threads, seconds) for _ in range(ROUNDS)]
        except OSError:  # a file system without reads past the cache
            return None
        found.append(Spread.of(rates))
    return max(found, key=lambda spread: spread.median)


def _loop_rate(path: Path, num_threads: int, seconds: float) -> float:
    """Bytes a second of plain positional reads past the page cache."""
    fd = os.open(path, os.O_RDONLY | _O_DIRECT)
    try:
        num_blocks = os.fstat(fd).st_size // _LOOP_BYTES
        moved_bytes = [0] * num_threads
        stop_s = time.perf_counter() + seconds

        def read(thread: int) -> None:
            with _private_memory(_LOOP_BYTES) as memory, memoryview(memory) as view:
                block = thread
                while time.perf_counter() < stop_s:
                    moved_bytes[thread] += os.preadv(fd, [view], block * _LOOP_BYTES)
                    block = (block + num_threads) % max(num_blocks, 1)

        threads = [threading.Thread(target=read, args=(index,)) for index in range(num_threads)]
        started_s = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(moved_bytes) / (time.perf_counter() - started_s)
    finally:
        os.close(fd)


def _private_memory(num_bytes: int) -> mmap.mmap:
    """Page-aligned memory; on huge pages, which a disk fills with less ado, where there are some."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


# ---- matrices


def _shapes(spec: ModelSpec) -> list[tuple[int, int]]:
    """The different matrix shapes of a decoder layer."""
    shapes = {
        (tensor.shape[0], tensor.shape[1])
        for tensor in layer_tensors(spec, 1)
        if tensor.kind == "matrix"
    }
    return sorted(shapes)


def matrix_rate(
    backend: Backend,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    *,
    rows: Sequence[int] = MATRIX_ROWS,
    seconds: float = MATRIX_S,
) -> MatrixRate:
    """The best rate over shapes, numbers of rows and layouts of the weight."""
    rates = []
    for shape in shapes:
        weight_FD = backend.allocate(shape, dtype)
        weight_FD.normal_()
        layouts = [(False, weight_FD)]
        if isinstance(backend, PacksWeights):
            packed = backend.pack(weight_FD)
            if packed is not weight_FD:
                layouts.append((True, packed))
        for num_rows in rows:
            x_TD = backend.allocate((num_rows, shape[1]), dtype)
            x_TD.normal_()
            flops = 2 * num_rows * shape[0] * shape[1]
            for is_packed, weight in layouts:
                per_s = _best_rate(partial(backend.matmul, x_TD, weight), backend, seconds)
                rates.append(
                    MatrixRate(
                        flops_per_s=flops * per_s, rows=num_rows, shape=shape, packed=is_packed
                    )
                )
    return max(rates, key=lambda rate: rate.flops_per_s)


# ---- memory


def _memory_read(backend: Backend) -> float:
    """Bytes a second of adding up a tensor that no cache holds."""
    x_B = backend.allocate((MEMORY_BYTES // 4,), torch.float32).zero_()
    return MEMORY_BYTES * _best_rate(x_B.sum, backend, MEMORY_S)


def _memory_copy(backend: Backend) -> float:
    """Bytes a second of copying from one touched tensor to another."""
    src_B = backend.allocate((MEMORY_BYTES // 2,), torch.uint8).zero_()
    dst_B = backend.allocate((MEMORY_BYTES // 2,), torch.uint8).zero_()
    return (
        MEMORY_BYTES
        / 2
        * _best_rate(lambda: backend.copy_async(src_B, dst_B).join(), backend, MEMORY_S)
    )


def _best_rate(act: Callable[[], object], backend: Backend, seconds: float) -> float:
    """Times a second that `act` can be done: the median of three rounds after a warm-up."""

    def once(count: int) -> float:
        started_s = time.perf_counter()
        for _ in range(count):
            act()
        backend.sync()  # a device with queues of its own has only been told so far
        return (time.perf_counter() - started_s) / count

    once(1)
    count = max(1, int(seconds / ROUNDS / once(2)))
    return 1 / statistics.median(once(count) for _ in range(ROUNDS))

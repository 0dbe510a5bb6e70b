"""Random weights of the right shapes, in a real safetensors file: `--load-format dummy`.

The numbers follow the model's usual initialisation, so that activations stay of a sane size:
matrices N(0, 0.02), norm weights 1, biases N(0, 0.01). A tensor depends on the seed and its own
name alone, not on what else is in the file.

Normal numbers are drawn by looking 16 random bits up in a table of 65,536 quantiles that are
already in the wanted dtype: a third of the time of drawing float32 numbers and converting them.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from flexport.checkpoint.header import read_header
from flexport.checkpoint.writer import FileLayout, NewTensor, flush, new_file
from flexport.records import FileTensor

__all__ = ["DummyKind", "DummyTensor", "write_dummy"]

DummyKind: TypeAlias = Literal["matrix", "norm", "bias"]
DummyTensor: TypeAlias = tuple[str, Sequence[int], DummyKind]
"""Name, shape, kind."""

_STD: Final = {"matrix": 0.02, "bias": 0.01}
_CHUNK_VALUES = 4 << 20
"""Values drawn at once; part of what a tensor's numbers depend on."""
_FLUSH_BYTES = 256 << 20
_NUM_THREADS = 2


def write_dummy(
    path: Path, tensors: Sequence[DummyTensor], dtype: str, seed: int
) -> dict[str, FileTensor]:
    """Write `tensors` as random numbers to a safetensors file at `path`, and say where they lie.

    Memory stays at a few dozen MiB whatever the sizes. A file that is there already is replaced,
    whole, at the end. Raises StorageError, DiskFull.
    """
    # Large tensors first: their sizes are multiples of a page, so most of them start on one, and
    # can be read past the page cache without a detour.
    ordered = sorted(tensors, key=lambda tensor: -math.prod(tensor[1]))
    layout = FileLayout(
        [NewTensor(name=name, dtype=dtype, shape=tuple(shape)) for name, shape, _ in ordered]
    )
    with new_file(path, layout.num_bytes, "random weights") as file:
        file.write(layout.header)
        _write(file, ordered, dtype, seed)
    return read_header(path)


def _write(file: IO[bytes], tensors: Sequence[DummyTensor], dtype: str, seed: int) -> None:
    """The data, drawn by a few threads ahead of the writing."""
    tables = {kind: _table(kind, dtype) for kind in ("matrix", "norm", "bias")}
    chunks = _chunks(tensors)
    unflushed_bytes = 0
    under_way: deque[Future[npt.NDArray[Any]]] = deque()
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        while True:
            for name, kind, chunk, num_values in chunks:
                under_way.append(pool.submit(_draw, tables[kind], seed, name, chunk, num_values))
                if len(under_way) > _NUM_THREADS:
                    break
            if not under_way:
                break
            values = under_way.popleft().result()
            file.write(values.data)
            unflushed_bytes += values.nbytes
            if unflushed_bytes >= _FLUSH_BYTES:
                flush(file)
                unflushed_bytes = 0


def _chunks(tensors: Sequence[DummyTensor]) -> Iterator[tuple[str, DummyKind, int, int]]:
    """Name, kind, number within the tensor and number of values of each piece, in file order."""
    for name, shape, kind in tensors:
        num_values = math.prod(shape)
        for chunk, start in enumerate(range(0, num_values, _CHUNK_VALUES)):
            yield name, kind, chunk, min(_CHUNK_VALUES, num_values - start)


def _table(kind: DummyKind, dtype: str) -> npt.NDArray[Any]:
    """Values of `kind` as they lie in the file: 65,536 equally likely ones, or a single one."""
    if kind == "norm":
        values = torch.ones(1)
    else:
        middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
        values = torch.special.ndtri(middles) * _STD[kind]
    bits = values.to(getattr(torch, dtype)).view(torch.int32 if dtype == "float32" else torch.int16)
    return bits.numpy()


def _draw(
    table: npt.NDArray[Any], seed: int, name: str, chunk: int, num_values: int
) -> npt.NDArray[Any]:
    if len(table) == 1:
        return np.repeat(table, num_values)
    digest = hashlib.sha256(f"{seed} {chunk} {name}".encode()).digest()
    source = np.random.SFC64(np.frombuffer(digest, dtype=np.uint32))
    # 64 random bits are four places in the table.
    words = source.random_raw(-(-num_values // 4))
    values: npt.NDArray[Any] = table[words.view(np.uint16)[:num_values]]
    return values

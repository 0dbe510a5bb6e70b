"""Random weights of the right shapes, in a real safetensors file: `--load-format dummy`.

The numbers follow the model's usual initialisation, so that activations stay of a sane size:
matrices N(0, 0.02), norm weights 1, biases N(0, 0.01). A tensor depends on the seed and its own
name alone, not on what else is in the file.

Normal numbers are drawn by looking 16 random bits up in a table of 65,536 quantiles that are
already in the wanted dtype: a third of the time of drawing float32 numbers and converting them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from flexport.checkpoint.header import read_header
from flexport.errors import DiskFull, StorageError
from flexport.records import FileTensor
from flexport.units import format_bytes

__all__ = ["DummyKind", "DummyTensor", "write_dummy"]

DummyKind: TypeAlias = Literal["matrix", "norm", "bias"]
DummyTensor: TypeAlias = tuple[str, Sequence[int], DummyKind]
"""Name, shape, kind."""

_STD: Final = {"matrix": 0.02, "bias": 0.01}
_DTYPES: Final = {"float32": ("F32", 4), "bfloat16": ("BF16", 2), "float16": ("F16", 2)}
"""The format's name and the bytes of a value."""
_CHUNK_VALUES = 4 << 20
"""Values drawn at once; part of what a tensor's numbers depend on."""
_ALIGNMENT = 4096
_FLUSH_BYTES = 256 << 20
_NUM_THREADS = 2
_NO_ROOM = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})


def write_dummy(
    path: Path, tensors: Sequence[DummyTensor], dtype: str, seed: int
) -> dict[str, FileTensor]:
    """Write `tensors` as random numbers to a safetensors file at `path`, and say where they lie.

    Memory stays at a few dozen MiB whatever the sizes. A file that is there already is replaced,
    whole, at the end. Raises StorageError, DiskFull.
    """
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    # Large tensors first: their sizes are multiples of a page, so most of them start on one, and
    # can be read past the page cache without a detour.
    ordered = sorted(tensors, key=lambda tensor: -math.prod(tensor[1]))
    try:
        try:
            with part.open("wb") as file:
                _write(file, ordered, dtype, seed)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        num_bytes = sum(math.prod(shape) for _, shape, _ in tensors) * _DTYPES[dtype][1]
        kind = DiskFull if error.errno in _NO_ROOM else StorageError
        raise kind(
            f"can't write {format_bytes(num_bytes)} of random weights to {path}: "
            f"{error.strerror or error}"
        ) from error
    return read_header(path)


def _write(file: IO[bytes], tensors: Sequence[DummyTensor], dtype: str, seed: int) -> None:
    """Header and data, drawn by a few threads ahead of the writing."""
    file.write(_header(tensors, dtype))
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
                _flush(file)
                unflushed_bytes = 0
    _flush(file)


def _header(tensors: Sequence[DummyTensor], dtype: str) -> bytes:
    """The file's first bytes, padded so that the data starts on a page."""
    format_name, value_bytes = _DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start_bytes = 0
    for name, shape, _ in tensors:
        assert name not in entries, f"{name} occurs twice"
        stop_bytes = start_bytes + math.prod(shape) * value_bytes
        entries[name] = {
            "dtype": format_name,
            "shape": list(shape),
            "data_offsets": [start_bytes, stop_bytes],
        }
        start_bytes = stop_bytes
    text = json.dumps(entries).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


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
    bits = values.to(getattr(torch, dtype)).view(
        torch.int16 if _DTYPES[dtype][1] == 2 else torch.int32
    )
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


def _flush(file: IO[bytes]) -> None:
    """Write what is buffered to the disk and forget it, so that it does not fill the page cache."""
    file.flush()
    os.fsync(file.fileno())
    if sys.platform == "linux":
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

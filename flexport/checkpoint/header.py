"""The header of a safetensors file, checked before anything trusts it.

A file is 8 bytes (the header's size N, little-endian), N bytes of JSON that give each tensor's
dtype, shape and byte range, and then the data. Nothing of the data is read here, and torch is not
imported. A file that passes has ranges that fit their shapes, do not overlap, leave no holes and
end exactly where the file ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, TypeGuard

from flexport.errors import CheckpointError
from flexport.records import FileTensor
from flexport.units import format_bytes

__all__ = ["FLOAT_DTYPES", "FORMAT_NAMES", "read_header", "refusal"]

FLOAT_DTYPES: Final = frozenset({"float64", "float32", "float16", "bfloat16"})
"""What a weight may be stored as."""

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger number is a sign of a file that is something else."""

_DTYPES: Final = {
    "F64": ("float64", 8), "F32": ("float32", 4), "F16": ("float16", 2), "BF16": ("bfloat16", 2),
    "I64": ("int64", 8), "I32": ("int32", 4), "I16": ("int16", 2), "I8": ("int8", 1),
    "U64": ("uint64", 8), "U32": ("uint32", 4), "U16": ("uint16", 2), "U8": ("uint8", 1),
    "BOOL": ("bool", 1), "C64": ("complex64", 8),
    "F8_E4M3": ("float8_e4m3fn", 1), "F8_E5M2": ("float8_e5m2", 1), "F8_E8M0": ("float8_e8m0fnu", 1),
}  # fmt: skip
"""The format's names, torch's names and the bytes of a value.

Names that are not here are kept as they are, with sizes unchecked: a file may hold tensors that
nobody asks for.
"""

FORMAT_NAMES: Final = {ours: (name, num_bytes) for name, (ours, num_bytes) in _DTYPES.items()}
"""By torch's names, the format's and the bytes of a value."""

_MAX_LISTED = 20
_LFS_POINTER = b"version https://git-lfs"


def refusal(what: str, problems: Iterable[str]) -> CheckpointError:
    """One error that lists all `problems` of `what`, the first ones in full."""
    listed = list(problems)
    lines = listed[:_MAX_LISTED]
    if len(listed) > _MAX_LISTED:
        lines.append(f"and {len(listed) - _MAX_LISTED} more")
    return CheckpointError("\n  - ".join([f"{what}:", *lines]))


def read_header(path: Path) -> dict[str, FileTensor]:
    """The tensors of a safetensors file, by name, in the order of their data.

    Raises CheckpointError, with every problem of the file in it.
    """
    try:
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if head == _LFS_POINTER[:8] and _LFS_POINTER.startswith(head):
                raise CheckpointError(
                    f"{path} is a git-lfs pointer and not the file itself; fetch the file with "
                    "`git lfs pull`"
                )
            header_bytes = int.from_bytes(head, "little")
            if len(head) < 8 or header_bytes > min(file_bytes - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{path} is truncated, or no safetensors file: it has {file_bytes} bytes and "
                    f"its first 8 announce a header of {header_bytes} "
                    f"(at most {MAX_HEADER_BYTES}); get the file again"
                )
            text = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error

    entries, problems = _entries(path, text)
    data_bytes = file_bytes - 8 - header_bytes
    tensors = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        found = _tensor(path, name, entry, 8 + header_bytes)
        if isinstance(found, FileTensor):
            tensors.append(found)
        else:
            problems.append(f"{name}: {found}")
    tensors.sort(key=lambda tensor: (tensor.offset_bytes, tensor.num_bytes))
    # Ranges that could not be read would look like holes.
    if not problems:
        problems = _layout_problems(tensors, 8 + header_bytes, data_bytes)
    if problems:
        raise refusal(f"the header of {path} can't be right; get the file again", problems)
    return {tensor.name: tensor for tensor in tensors}


def _entries(path: Path, text: bytes) -> tuple[dict[str, Any], list[str]]:
    """The header's JSON object, and the names that occur twice in it."""
    problems: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            problems.extend(f"{name}: occurs twice" for name in table if names.count(name) > 1)
        return table

    try:
        entries = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the header of {path} is not JSON ({error}); get the file again"
        ) from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"the header of {path} is not a JSON object; get the file again")
    return entries, problems


def _tensor(path: Path, name: str, entry: object, data_offset_bytes: int) -> FileTensor | str:
    """The tensor that an entry describes, or what is wrong with the entry."""
    if not isinstance(entry, dict):
        return f"is no object with dtype, shape and data_offsets, but {entry!r:.80}"
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        return f"has no dtype, but {dtype!r:.80}"
    if not _are_sizes(shape):
        return f"has no shape, but {shape!r:.80}"
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"has no data_offsets, but {offsets!r:.80}"
    start_bytes, stop_bytes = offsets
    torch_name, value_bytes = _DTYPES.get(dtype, (dtype, 0))
    wanted_bytes = math.prod(shape) * value_bytes
    if value_bytes and stop_bytes - start_bytes != wanted_bytes:
        return (
            f"takes {wanted_bytes} bytes as {dtype} {shape}, but its range "
            f"{start_bytes}-{stop_bytes} has {stop_bytes - start_bytes}"
        )
    return FileTensor(
        name=name,
        path=path,
        offset_bytes=data_offset_bytes + start_bytes,
        num_bytes=stop_bytes - start_bytes,
        dtype=torch_name,
        shape=tuple(shape),
    )


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    # type() and not isinstance: JSON's true is an int in Python.
    return isinstance(values, list) and all(type(size) is int and size >= 0 for size in values)


def _layout_problems(
    tensors: list[FileTensor], data_offset_bytes: int, data_bytes: int
) -> list[str]:
    """What is wrong with the ranges of `tensors`, which come in the order of their offsets."""
    problems = []
    reached_bytes, before = data_offset_bytes, "the header"
    for tensor in tensors:
        stop_bytes = tensor.offset_bytes + tensor.num_bytes
        if tensor.offset_bytes < reached_bytes:
            problems.append(
                f"{tensor.name}: its bytes {tensor.offset_bytes}-{stop_bytes} overlap those of "
                f"{before}, which end at {reached_bytes}"
            )
        elif tensor.offset_bytes > reached_bytes:
            problems.append(
                f"{tensor.name}: starts at byte {tensor.offset_bytes}, and nothing describes the "
                f"bytes from {reached_bytes} on"
            )
        if stop_bytes > reached_bytes:
            reached_bytes, before = stop_bytes, tensor.name
    file_bytes = data_offset_bytes + data_bytes
    if reached_bytes > file_bytes:
        missing = format_bytes(reached_bytes - file_bytes)
        problems.append(
            f"the data ends at byte {reached_bytes}, but the file at {file_bytes}: "
            f"{missing} are missing"
        )
    elif reached_bytes < file_bytes:
        problems.append(f"the data ends at byte {reached_bytes}, but the file only at {file_bytes}")
    return problems

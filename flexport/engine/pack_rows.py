"""A matrix's rows, read from a checkpoint a chunk at a time and packed: what is written next.

Dimension key: R rows (features out), D features in, B bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from flexport.checkpoint.writer import forget
from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Layout
from flexport.engine.stored import Stored
from flexport.errors import CheckpointError, StorageError
from flexport.records import FileTensor
from flexport.torch_ops import as_tensor, torch_dtype

__all__ = ["packed_rows"]

CHUNK_BYTES = 16 << 20
"""Of the checkpoint, read and packed at once. Quantising takes about ten times as much memory."""


def packed_rows(
    stored: Stored, layout: Layout, form: Compressed
) -> Iterator[tuple[int, Sequence[tuple[int, memoryview]]]]:
    """A plain matrix in the form, some rows at a time: how many, and of each part what to write.

    That is the first of its lines, and bytes from there on. Raises StorageError, and CheckpointError
    if a value is not finite.
    """
    (source,) = stored.files
    for begin, values_RD in _chunks(stored, layout):
        try:
            encoded = form.encode(values_RD)
        except ValueError as error:
            raise CheckpointError(
                f"{source.name} in {source.path} can't be compressed: {error}; get the file again, "
                "or use --compress-weights none if it is meant to be so"
            ) from error
        end = begin + len(values_RD)
        pieces = []
        for part, tensor in zip(layout.parts, encoded, strict=True):
            first, last = part.lines(begin, end)
            assert tensor.shape == (last - first, *part.shape[1:]), (part, tensor.shape)
            pieces.append((first, tensor.contiguous().view(torch.uint8).numpy().data))
        yield len(values_RD), pieces


def _chunks(stored: Stored, layout: Layout) -> Iterator[tuple[int, Tensor]]:
    """Rows of the matrix as it is to be, each lot with the first one's number."""
    (source,) = stored.files
    rows, features = layout.shape
    row_bytes = source.num_bytes // rows
    cut = layout.rows_per_cut
    at_once = min(max(1, CHUNK_BYTES // row_bytes // cut) * cut, rows)
    dtype = torch_dtype(source.dtype)
    bytes_B = torch.empty(at_once * row_bytes, dtype=torch.uint8)
    turned = stored.transposed
    with _reading(source) as read_into:
        if turned and at_once < rows:
            # Each lot takes a little of every line. Read once from end to end, the page cache
            # has them all.
            for at in range(0, source.num_bytes, len(bytes_B)):
                read_into(bytes_B[: source.num_bytes - at], at)
        for begin in range(0, rows, at_once):
            num = min(at_once, rows - begin)
            own_B = bytes_B[: num * row_bytes]
            if not turned or num == rows:
                read_into(own_B, begin * row_bytes)
            else:
                for line, line_B in enumerate(own_B.chunk(features)):
                    read_into(line_B, (line * rows + begin) * dtype.itemsize)
            if turned:
                yield begin, as_tensor(own_B, 0, (features, num), dtype).T.contiguous()
            else:
                yield begin, as_tensor(own_B, 0, (num, features), dtype)


@contextmanager
def _reading(tensor: FileTensor) -> Iterator[Callable[[Tensor, int], None]]:
    """Fills flat bytes from an offset in a tensor on; raises StorageError.

    Afterwards the page cache has room for something else.
    """

    def explain(reason: object) -> StorageError:
        return StorageError(f"can't read {tensor.name} in {tensor.path}: {reason}")

    try:
        file = tensor.path.open("rb", buffering=0)
    except OSError as error:
        raise explain(error.strerror or error) from error
    with file:

        def read_into(bytes_B: Tensor, offset_bytes: int) -> None:
            left = bytes_B.numpy().data
            try:
                file.seek(tensor.offset_bytes + offset_bytes)
                while left:
                    num_bytes = file.readinto(left)
                    if not num_bytes:
                        raise explain("the file has become shorter")
                    left = left[num_bytes:]
            except OSError as error:
                raise explain(error.strerror or error) from error

        yield read_into
        forget(file, tensor.offset_bytes, tensor.num_bytes)

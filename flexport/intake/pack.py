"""Rows of about the same length side by side, so that a micro-batch wastes little on its longest.

Works on a window of requests at a time, since the input may be too long to be held, or endless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from flexport.records import Request

__all__ = ["pack"]


def pack(
    requests: Iterable[Request],
    batch_size: int,
    window: int,
    fits: Callable[[Sequence[Request]], bool] | None = None,
) -> Iterator[list[Request]]:
    """Micro-batches of up to `batch_size` requests that are neighbours in length.

    Reads `window` requests ahead, rounded up to whole micro-batches, so that only the last one is
    partial. Within a window the longest come first: what is too much for the memory shows at
    once. A micro-batch that no longer `fits` is closed earlier; a request that does not fit even
    alone comes alone.
    """
    assert batch_size >= 1, batch_size
    window = max(1, -(-window // batch_size)) * batch_size
    source = iter(requests)
    while ahead := list(islice(source, window)):
        ahead.sort(key=lambda request: (-len(request.token_ids), -request.sampling.max_tokens))
        batch: list[Request] = []
        for request in ahead:
            full = len(batch) == batch_size
            if batch and (full or (fits is not None and not fits([*batch, request]))):
                yield batch
                batch = []
            batch.append(request)
        yield batch

"""What a backend computes with: products, decoding, laying out, memory, picking a token.

Weights are of the size that they have in models, and more of them than a cache holds pass in turn:
a decode step meets every weight once.

Dimension key: T tokens, D features in, F features out, R rows of logits, V vocabulary, B bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypeVar

import torch
from torch import Tensor

from flexport.backend import Backend, MultipliesPacked, PacksWeights
from flexport.bench.profile.timing import Effort, Timed, seconds_of, seconds_of_each
from flexport.bench.spread import Spread
from flexport.codecs.compressed import Compressed, compressed
from flexport.engine.sample import RowSampling, sample
from flexport.engine.transfer import to_device
from flexport.planner.machine import Curve
from flexport.records import SamplingParams
from flexport.torch_ops import torch_dtype

__all__ = [
    "CODECS",
    "Rated",
    "decode_rate",
    "lay_out_rate",
    "memory_rate",
    "packed_products",
    "products",
    "sample_rate",
]

SHAPE = (5632, 2048)
"""Features out and in: those of the MLP of a model of 1.1 B."""

ROWS = (1, 4, 16, 64, 256, 1024)
"""From one row's decode step to a visit of a prefill."""

CODECS = ("int8", "int4")

HEAD_ROWS, VOCABULARY = 64, 32000

MOST_ROWS = 1 << 20
"""Nobody gives a sweep more tokens: what so many are multiplied with is never decoded."""

Weight = TypeVar("Weight")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """Products in one form."""

    resident: Curve
    streamed: Curve
    spread: float
    """The widest of all rows."""
    direct_rows: int = 0
    """Of a codec, as in `planner.machine.Computer`."""


def products(backend: Backend, dtype: str, effort: Effort) -> Rated:
    """Products in a dtype, with plain weights and as the backend lays out what stays."""
    item = torch_dtype(dtype)
    shape = _shape(effort, item.itemsize)
    weights = _weights(backend, shape, item, effort)
    streamed, spread = _curve(backend, backend.matmul, weights, shape, item, ROWS, effort)
    resident = streamed
    packed = [_laid_out(backend, weight) for weight in weights]
    if packed[0] is not weights[0]:
        del weights
        resident, other = _curve(backend, backend.matmul, packed, shape, item, ROWS, effort)
        spread = max(spread, other)
    return Rated(resident=resident, streamed=streamed, spread=spread)


def packed_products(backend: Backend, codec: str, dtype: str, effort: Effort) -> Rated | None:
    """Products in a codec and `dtype`; None if the backend has the weights decoded for them."""
    if not isinstance(backend, MultipliesPacked):
        return None
    item, form, able = torch_dtype(dtype), _form(codec), backend
    most = _most_rows(lambda rows: able.multiplies(codec, item, rows))
    if not most:
        return None
    shape = _shape(effort, 1)
    parts = _random_parts(backend, form, shape)
    num_bytes = sum(part.numel() * part.element_size() for part in parts)
    plain = [
        form.matrix([part.clone() for part in parts], shape)
        for _ in range(_count(effort, num_bytes))
    ]

    def multiply(x_TD: Tensor, matrix: object) -> object:
        return able.matmul_packed(x_TD, [matrix], [None])  # type: ignore[list-item]

    rows = [each for each in ROWS if each <= most]
    streamed, spread = _curve(backend, multiply, plain, shape, item, rows, effort)
    resident = streamed
    settled = [able.settle(matrix, item) for matrix in plain]
    if settled[0] is not None:
        del plain
        resident, other = _curve(backend, multiply, settled, shape, item, rows, effort)
        spread = max(spread, other)
    return Rated(resident=resident, streamed=streamed, spread=spread, direct_rows=most)


def decode_rate(backend: Backend, codec: str, dtype: str, effort: Effort) -> Spread:
    """Values a second of packed weights that become numbers on the device."""
    item, form = torch_dtype(dtype), _form(codec)
    shape = _shape(effort, item.itemsize)
    parts = _random_parts(backend, form, shape)
    count = _count(effort, math.prod(shape) * item.itemsize)
    copies = cycle([[part.clone() for part in parts] for _ in range(count)])
    places = cycle([backend.allocate(shape, item).zero_() for _ in range(count)])
    with torch.inference_mode():
        return _rate(
            math.prod(shape),
            seconds_of(
                backend,
                lambda: form.decode(next(copies), next(places), 0),
                effort.kernel_s,
                effort.rounds,
            ),
        )


def lay_out_rate(backend: Backend, dtype: str, effort: Effort) -> Spread | None:
    """Values a second that become the kernel's layout; None where they stay as they come."""
    item = torch_dtype(dtype)
    shape = _shape(effort, item.itemsize)
    weight_FD = backend.allocate(shape, item).normal_(0, 0.02)
    if _laid_out(backend, weight_FD) is weight_FD:
        return None
    act = lambda: _laid_out(backend, weight_FD)  # noqa: E731 - it is timed and gone
    return _rate(math.prod(shape), seconds_of(backend, act, effort.kernel_s, effort.rounds))


def memory_rate(backend: Backend, effort: Effort) -> Spread:
    """Bytes a second of adding up a tensor that no cache holds."""
    num_bytes = effort.pool_bytes
    x_B = backend.allocate((num_bytes // 4,), torch.float32).zero_()
    return _rate(num_bytes, seconds_of(backend, x_B.sum, effort.kernel_s, effort.rounds))


def sample_rate(backend: Backend, dtype: str, effort: Effort) -> Spread:
    """Values a second from the head's product to picked tokens, greedily."""
    vocabulary = max(64, min(VOCABULARY, effort.pool_bytes // (16 * HEAD_ROWS)))
    logits_RV = backend.allocate((HEAD_ROWS, vocabulary), torch_dtype(dtype)).normal_()
    rows = [RowSampling(params=SamplingParams(max_tokens=1), seed=0, step=0)] * HEAD_ROWS
    with torch.inference_mode():
        seconds = seconds_of(
            backend, lambda: sample(logits_RV.float(), rows), effort.kernel_s, effort.rounds
        )
    return _rate(logits_RV.numel(), seconds)


def _curve(
    backend: Backend,
    multiply: Callable[[Tensor, Weight], object],
    weights: Sequence[Weight],
    shape: tuple[int, int],
    dtype: torch.dtype,
    rows: Sequence[int],
    effort: Effort,
) -> tuple[Curve, float]:
    """Rates against rows, and the widest spread of one.

    A job meets good moments and bad ones, and takes their mean; so it is the mean that counts here.
    """
    timed: list[Timed] = []
    for num_rows in rows:
        x_TD = backend.allocate((num_rows, shape[1]), dtype).normal_()
        turn = cycle(weights)

        def act(x_TD: Tensor = x_TD, turn: Iterator[Weight] = turn) -> None:
            multiply(x_TD, next(turn))

        timed.append(Timed(backend, act, effort.kernel_s / effort.rounds))
        if timed[-1].about_s > effort.kernel_s:
            break  # at so many rows the rate stays, and the next would take four times as long
    seconds = seconds_of_each(timed, effort.rounds)
    rows = rows[: len(seconds)]
    flops = [2 * num_rows * math.prod(shape) for num_rows in rows]
    curve = Curve(
        rows=tuple(float(num_rows) for num_rows in rows),
        flops_per_s=tuple(
            each / statistics.fmean(of.values) for each, of in zip(flops, seconds, strict=True)
        ),
    )
    return curve, max(each.spread for each in seconds)


def _weights(
    backend: Backend, shape: tuple[int, int], dtype: torch.dtype, effort: Effort
) -> list[Tensor]:
    """As many as the pool holds; drawing numbers takes longer than copying them."""
    first_FD = backend.allocate(shape, dtype).normal_(0, 0.02)
    count = _count(effort, math.prod(shape) * dtype.itemsize)
    others = [backend.allocate(shape, dtype).copy_(first_FD) for _ in range(count - 1)]
    return [first_FD, *others]


def _most_rows(says_yes: Callable[[int], bool]) -> int:
    """The largest number up to MOST_ROWS that it says yes to, and to all below; 0: to none."""
    low, high = 0, MOST_ROWS
    if says_yes(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if says_yes(middle) else (low, middle)
    return low


def _laid_out(backend: Backend, weight_FD: Tensor) -> Tensor:
    return backend.pack(weight_FD) if isinstance(backend, PacksWeights) else weight_FD


def _form(codec: str) -> Compressed:
    form = compressed(codec)
    assert form is not None, codec
    return form


def _random_parts(backend: Backend, form: Compressed, shape: tuple[int, int]) -> list[Tensor]:
    """The parts of a packed matrix on the device: random codes, and scales of a usual size."""
    parts = []
    for part in form.layout("weight", shape).parts:
        assert part.dtypes is not None and len(part.dtypes) == 1, part
        item = torch_dtype(next(iter(part.dtypes)))
        if item.is_floating_point:
            host = torch.full(part.shape, 2.0**-9, dtype=item)
        else:
            info = torch.iinfo(item)
            host = torch.randint(info.min, info.max + 1, part.shape, dtype=item)
        parts.append(to_device(backend, host))
    return parts


def _shape(effort: Effort, item_bytes: int) -> tuple[int, int]:
    """SHAPE, or as many of its rows as let four such matrices into the pool."""
    most = effort.pool_bytes // (4 * SHAPE[1] * item_bytes) // 64 * 64
    return max(64, min(SHAPE[0], most)), SHAPE[1]


def _count(effort: Effort, num_bytes: int) -> int:
    """How many of these the pool holds."""
    return max(2, effort.pool_bytes // num_bytes)


def _rate(amount: float, seconds: Spread) -> Spread:
    """Amounts a second."""
    return Spread.of([amount / each_s for each_s in seconds.values])

"""The CPU beside a device: it computes on what is at home in host memory, where that lies.

Small tensors cross the link for it, instead of the large ones they are multiplied with: queries
and results instead of a cache, hidden states instead of weights.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from flexport.backend import AttentionSpec, Backend, Ticket
from flexport.engine.trace import HOST_COMPUTE
from flexport.store.lanes import Watch
from flexport.store.pool import Buffer
from flexport.store.store import Store
from flexport.torch_ops import as_tensor

__all__ = ["Crossing", "HostCompute"]


class Crossing:
    """Device tensors on their way to the host."""

    def __init__(
        self,
        host: HostCompute,
        tensors: Sequence[Tensor],
        tickets: Sequence[Ticket],
        buffer: Buffer,
        num_brought: int,
    ) -> None:
        self._host = host
        self._tensors = tensors
        self._tickets = tickets
        self._buffer = buffer
        self._num_brought = num_brought

    def receive(self) -> Sequence[Tensor]:
        """The tensors in host memory, complete; they stay until `release`."""
        for ticket in self._tickets:
            ticket.join()
        self._host.let_go(self._num_brought)
        return self._tensors

    def release(self) -> None:
        """What was received is not needed any more."""
        self._host.give_back(self._buffer)


class HostCompute:
    """Two kernels in host memory, and the ways there and back."""

    def __init__(self, cpu: Backend, store: Store, watch: Watch | None = None) -> None:
        """`cpu` computes in host memory; buffers for the ways come from the store's host pool."""
        assert cpu.capabilities.addressable, cpu.capabilities
        assert not store.unified, "where memory is one there is nothing to spare"
        self.keys_by_feature = cpu.capabilities.keys_by_feature
        self.busy_s = 0.0
        self._cpu = cpu
        self._store = store
        self._watch = watch
        self._arriving: deque[tuple[Ticket, Buffer]] = deque()
        self._num_let_go = 0

    def send(self, tensors: Sequence[Tensor]) -> Crossing:
        """Start copying device tensors of one dtype to the host, behind what computes them."""
        dtype = tensors[0].dtype
        buffer = self._store.host.take(
            sum(tensor.numel() for tensor in tensors) * dtype.itemsize, self._store.wait_for_a_write
        )
        arrived, tickets, at = [], [], 0
        for tensor in tensors:
            place = as_tensor(buffer.bytes_B, at, tensor.shape, dtype)
            tickets.append(self._store.copy("device_to_host", tensor, place))
            arrived.append(place)
            at += tensor.numel() * dtype.itemsize
        return Crossing(self, arrived, tickets, buffer, self._num_let_go + len(self._arriving))

    def bring(self, values: Tensor, place: Tensor) -> None:
        """Copy what was computed here to a device tensor; the device goes on behind it."""
        num_bytes = values.numel() * values.dtype.itemsize
        buffer = self._store.host.take(num_bytes, self._store.wait_for_a_write)
        staged = as_tensor(buffer.bytes_B, 0, values.shape, values.dtype).copy_(values)
        ticket = self._store.copy("host_to_device", staged, place)
        ticket.wait()
        self._arriving.append((ticket, buffer))

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """As a backend's, in host memory."""
        with self.computing("attention"):
            return self._cpu.attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def matmul(self, x_TD: Tensor, weight_FD: Tensor) -> Tensor:
        """As a backend's, in host memory."""
        with self.computing("projection"):
            return self._cpu.matmul(x_TD, weight_FD)

    @contextmanager
    def computing(self, what: str) -> Iterator[None]:
        """Count the body as its work."""
        started_s = time.perf_counter()
        try:
            yield
        finally:
            ended_s = time.perf_counter()
            self.busy_s += ended_s - started_s
            if self._watch is not None:
                self._watch(HOST_COMPUTE, 0, f"{what}, {self._store.label}", started_s, ended_s)

    def let_go(self, num_brought: int) -> None:
        """Give back the buffers of the first so many results that were brought.

        All that were brought before something was sent have arrived when that has: the device
        computed what was sent behind them.
        """
        while self._num_let_go < num_brought:
            ticket, buffer = self._arriving.popleft()
            self._num_let_go += 1
            try:
                ticket.join()
            finally:
                self.give_back(buffer)

    def give_back(self, buffer: Buffer) -> None:
        """A buffer of a way is not needed any more."""
        self._store.host.give_back(buffer)

    def close(self) -> None:
        """Give back all buffers."""
        self.let_go(self._num_let_go + len(self._arriving))

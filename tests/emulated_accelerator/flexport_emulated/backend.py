"""The five verbs on an accelerator made of host memory.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Capabilities, Ticket
from flexport_emulated import kernels
from flexport_emulated.arena import host_bytes, poisoned
from flexport_emulated.device import Device
from flexport_emulated.device_tensor import DeviceTensor
from flexport_emulated.lanes import Fault, Lane

__all__ = ["EmulatedBackend", "Link"]

Link = Literal["host_to_device", "device_to_host", "within"]

LINKS: tuple[Link, ...] = ("host_to_device", "device_to_host", "within")

PAGE_TOKENS = 16

EXPRESS_BYTES = 64 << 10
"""Smaller copies have a lane of their own: a few token ids must not queue behind a layer's weights.
A real device has several queues for a link, and large copies can be cut."""

ENVIRONMENT_PREFIX = "FLEXPORT_EMULATED_"


class EmulatedBackend:
    """An accelerator with a hard memory size, queues and rates.

    With `unified=True` what `allocate` gives of host memory counts against the same size, though
    the host addresses device memory no more than otherwise.

    All work is queued and done in order: kernels and torch operations by one thread, copies by
    one thread for each direction. Rates are the fastest that the lanes may be; None is as fast
    as it goes.
    """

    def __init__(
        self,
        *,
        memory_bytes: int = 1 << 30,
        unified: bool = False,
        link_bytes_per_s: float | None = None,
        link_latency_s: float = 0.0,
        flops_per_s: float | None = None,
    ) -> None:
        self._link_bytes_per_s = link_bytes_per_s
        self._link_latency_s = link_latency_s
        self._flops_per_s = flops_per_s
        self._device = Device(memory_bytes)
        self._untold: list[BaseException] = []
        """Errors of copies, which `sync` has to tell."""
        self._lock = threading.Lock()
        self._links = {link: Lane(link, self._fail) for link in LINKS}
        self._express = {
            link: Lane(f"{link}, express", self._fail, lane.faults)
            for link, lane in self._links.items()
        }
        self._capabilities = Capabilities(
            name="emulated (an accelerator in host memory)",
            memory_bytes=memory_bytes,
            unified=unified,
            dtypes=("float32", "bfloat16", "float16"),
            dtype_reason="its kernels compute in float32, whatever they are given",
            page_tokens=PAGE_TOKENS,
        )

    @classmethod
    def from_environment(cls) -> EmulatedBackend:
        """One with the numbers of FLEXPORT_EMULATED_MEMORY (bytes), _LINK_BYTES_PER_S,
        _LINK_LATENCY_S and _FLOPS_PER_S, as far as they are set.
        """
        memory = _from_environment("MEMORY")
        return cls(
            memory_bytes=1 << 30 if memory is None else int(memory),
            link_bytes_per_s=_from_environment("LINK_BYTES_PER_S"),
            link_latency_s=_from_environment("LINK_LATENCY_S") or 0.0,
            flops_per_s=_from_environment("FLOPS_PER_S"),
        )

    # ---- what tests look at

    @property
    def used_bytes(self) -> int:
        """Device memory that tensors hold now; where memory is unified, the host's too."""
        return self._device.arena.used_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that `used_bytes` has been."""
        return self._device.arena.peak_bytes

    @property
    def allocated_peak_bytes(self) -> int:
        """The most that tensors of `allocate` have held, results of operations left out."""
        return self._device.arena.allocated_peak_bytes

    @property
    def num_reads(self) -> int:
        """How often the host has read values other than by copy_async, and waited for them."""
        return self._device.num_reads

    @property
    def num_uploads(self) -> int:
        """How often values of the host have come to the device other than by copy_async."""
        return self._device.num_uploads

    def busy_s(self, lane: Link | Literal["compute"]) -> float:
        """Seconds that a lane has worked so far."""
        return sum(each.busy_s for each in self._lanes(lane))

    @contextmanager
    def held(self, lane: Link | Literal["compute"]) -> Iterator[None]:
        """While it lasts, the lane takes work and begins none of it."""
        gate = threading.Event()
        for each in self._lanes(lane):
            each.give(lambda: None, after=gate)
        try:
            yield
        finally:
            gate.set()

    def num_begun(self, lane: Link | Literal["compute"]) -> int:
        """How many copies, or matmuls and attentions, a lane has begun so far."""
        return self._lanes(lane)[0].faults.num_begun  # which all of them share

    def fail_copy(self, link: Link, number: int, error: Fault) -> None:
        """Make a copy over a link fail, once; 0 is the next that begins."""
        self._links[link].faults.plan(number, error)

    def fail_kernel(self, number: int, error: Fault) -> None:
        """Make a matmul or attention fail, once; 0 is the next that begins."""
        self._device.compute.faults.plan(number, error)

    # ---- the contract

    @property
    def capabilities(self) -> Capabilities:
        """What this device is; constant while it is open."""
        return self._capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """A contiguous tensor full of NaN (or -1)."""
        self._device.check("allocate")
        if where == "device":
            return self._device.make(tuple(shape), None, dtype, allocated=True)
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._capabilities.unified:
            flat = host_bytes(num_bytes, self._device.arena.take(num_bytes, allocated=True))
        else:
            flat = poisoned(num_bytes)
        with torch.inference_mode(False):
            return flat.view(dtype).view(tuple(shape))

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Queue the copy in one of its link's lanes, behind all compute issued by now."""
        self._device.check("copy_async")
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError(
                f"a copy needs one shape and dtype: source has {tuple(src.shape)} {src.dtype}, "
                f"destination {tuple(dst.shape)} {dst.dtype}"
            )
        link = self._link(src, dst)
        num_bytes = src.numel() * src.element_size()
        cost_s = self._link_latency_s
        if self._link_bytes_per_s is not None:
            cost_s += num_bytes / self._link_bytes_per_s
        copy = _Copy(src, dst, self._device, self._fail)
        lanes = self._express if num_bytes < EXPRESS_BYTES else self._links
        lanes[link].give(
            copy.run,
            end=copy.end,
            after=self._device.compute.mark(),
            cost_s=cost_s,
            can_fail=True,
        )
        return copy

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """Queue the product."""
        self._device.check("matmul")
        x, weight = self._inner("matmul", x_TD), self._inner("matmul", weight_FD)
        bias = None if bias_F is None else self._inner("matmul", bias_F)
        if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
            raise ValueError(
                f"matmul was given x {tuple(x.shape)} and a weight {tuple(weight.shape)}; it "
                "needs (T, D) and (F, D)"
            )
        return self._kernel(
            (x.shape[0], weight.shape[0]),
            x.dtype,
            kernels.matmul_flops(x, weight),
            lambda: kernels.matmul(x, weight, bias),
        )

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Queue the attention."""
        self._device.check("attention")
        q = self._inner("attention", q_NHLE)
        keys = [self._inner("attention", page) for page in keys_NKGE]
        values = [self._inner("attention", page) for page in values_NKGE]
        sinks = None if spec.sinks is None else self._inner("attention", spec.sinks)
        fields = {name: getattr(spec, name) for name in AttentionSpec.__dataclass_fields__}
        own_spec = AttentionSpec(**{**fields, "sinks": sinks})
        num_columns = sum(page.shape[2] for page in keys)
        if num_columns < spec.length or q.shape[2] > spec.length:
            raise ValueError(
                f"attention was given {q.shape[2]} queries a row and pages of {num_columns} "
                f"columns for a length of {spec.length}"
            )
        return self._kernel(
            tuple(q.shape),
            q.dtype,
            kernels.attention_flops(q, spec),
            lambda: kernels.attention(q, keys, values, own_spec),
        )

    def sync(self) -> None:
        """Block until everything issued so far is done; raise the first error since the last call."""
        self._device.must_be_open("sync")
        compute = self._device.compute
        for lane in (compute, *self._links.values(), *self._express.values(), compute):
            lane.drain()
        with self._lock:
            untold = [*self._untold, *self._device.take_errors()]
            self._untold.clear()
        if untold:
            raise untold[0]

    def close(self) -> None:
        """Finish what was issued and end the lanes; may be called twice."""
        lanes = (*self._links.values(), *self._express.values())
        for lane in lanes:
            lane.drain()
        self._device.close()
        for lane in lanes:
            lane.close()

    # ---- inside

    def _lanes(self, lane: Link | Literal["compute"]) -> tuple[Lane, ...]:
        if lane == "compute":
            return (self._device.compute,)
        return self._links[lane], self._express[lane]

    def _kernel(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        num_flops: int,
        compute: Callable[[], Tensor],
    ) -> Tensor:
        out = self._device.make(shape, None, dtype)
        place = out.in_arena

        def work() -> None:
            with torch.inference_mode():
                place.copy_(compute())

        cost_s = num_flops / self._flops_per_s if self._flops_per_s is not None else 0.0
        self._device.issue(work, cost_s=cost_s, can_fail=True)
        return out

    def _inner(self, verb: str, tensor: Tensor) -> Tensor:
        if isinstance(tensor, DeviceTensor) and tensor.home is self._device:
            return tensor.in_arena
        raise RuntimeError(
            f"{verb} was given a {tuple(tensor.shape)} tensor on {tensor.device}, which is not "
            f"{self._device.torch_device}; copy it to the device first"
        )

    def _link(self, src: Tensor, dst: Tensor) -> Link:
        for tensor in (src, dst):
            if isinstance(tensor, DeviceTensor):
                self._inner("copy_async", tensor)
            elif tensor.device.type != "cpu":
                raise RuntimeError(f"copy_async was given a tensor on {tensor.device}")
        from_device, to_device = isinstance(src, DeviceTensor), isinstance(dst, DeviceTensor)
        if from_device == to_device:
            return "within"
        return "device_to_host" if from_device else "host_to_device"

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._untold.append(error)


class _Copy:
    """The ticket of one copy. It holds both tensors until the copy is done."""

    def __init__(
        self, src: Tensor, dst: Tensor, device: Device, fail: Callable[[BaseException], None]
    ) -> None:
        self._tensors: tuple[Tensor, Tensor] | None = (src, dst)
        self._device = device
        self._fail = fail
        self._done = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Do the copy; called once, by the lane."""
        assert self._tensors is not None, "a copy runs once"
        src, dst = (t.in_arena if isinstance(t, DeviceTensor) else t for t in self._tensors)
        # A tensor made in inference mode can be written to only in it.
        with torch.inference_mode():
            dst.copy_(src)

    def end(self, error: BaseException | None) -> None:
        """The copy's time is over; called once, by the lane."""
        self._tensors = None
        self._error = error
        if error is not None:
            self._fail(error)
        self._done.set()

    def wait(self) -> None:
        """Order later compute after the copy; returns at once."""
        if self._done.is_set():
            self.join()
        else:
            self._device.compute.give(self._must_have_succeeded, after=self._done)

    def join(self) -> None:
        """Block until the copy is done; raise what it raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def _must_have_succeeded(self) -> None:
        if self._error is not None:
            raise self._error


def _from_environment(name: str) -> float | None:
    """The number in one of this backend's environment variables; None if it is not set."""
    variable = ENVIRONMENT_PREFIX + name
    text = os.environ.get(variable, "").strip()
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf or (number == 0 and name != "LINK_LATENCY_S"):
        raise ValueError(f"{variable} has to be a number above 0, got {text!r}")
    return number

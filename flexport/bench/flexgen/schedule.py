"""FlexGen's schedule on a machine's numbers.

FlexGen (arXiv:2303.06865) goes through the same block in the same zig-zag as flexport, with other
rules for what happens when. For each token, layer and micro-batch there is a step, and a barrier
ends it; attention and MLP are layers of their own. In a step the micro-batch is computed, the cache
of the next one comes, and what the step has made goes home. All weights of the next layer come in a
layer's first step. So a step takes as long as its longest part, and what is left of a lane's time
meanwhile is lost. Here this is added up over all steps, with the rates of a `Machine`, with which
the planner makes flexport's own plans, too.

What FlexGen does at a rate of its own is in the constants below. They are the same for all models,
prompts and policies: no row of the table is fitted.

Sizes are bytes, times seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from flexport.bench.flexgen.published import GEN_LEN, Setting
from flexport.errors import UsageError
from flexport.models.spec import ModelSpec
from flexport.planner.machine import Machine

__all__ = ["Times", "placement", "times"]

ITEM_BYTES = 2
"""Half precision throughout."""

PACKED_BYTES = 4.5 / 8
"""Of a value in 4 bits, in groups of 64 with a scale and a minimum in half precision."""

UNPINNED_BYTES_PER_S = 4e9
"""Host memory that is not pinned, to the device: one thread copies it to memory that was pinned for
it, and then it crosses the link; the caller waits. Estimated: 6 GB/s and 12 GB/s one after the other. The
cache at home on the host is such memory; so are weights where they don't all fit pinned (175B)."""

CACHE_HOME_BYTES_PER_S = 0.97e9
"""New cache, from the device to the host's memory that is not pinned: a copying thread takes it
through a pinned buffer. The authors' cost model has this as its fit on this machine (repository
FMInference/FlexLLMGen, experimental/cost_model.py)."""

HIDDEN_HOME_BYTES_PER_S = 4.82e9
"""Hidden states from the device to the host; the authors' fit."""

STEP_S = 5e-5
"""What Python and the barrier of a step add to its kernels. Estimated."""


# ---- where weights are

Home = Literal["device", "host", "disk"]


def placement(tensors: Sequence[int], device: float, host: float) -> dict[Home, int]:
    """Bytes of a layer's tensors on each tier, of shares in per cent.

    Whole tensors only: laid end to end, disk first, each goes where its middle falls.
    """
    total, at = sum(tensors), 0
    placed: dict[Home, int] = {"device": 0, "host": 0, "disk": 0}
    for size in tensors:
        middle = 100 * (at + size / 2) / total
        home: Home = "device"
        if middle < 100 - device - host:
            home = "disk"
        elif middle < 100 - device:
            home = "host"
        placed[home] += size
        at += size
    return placed


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    """A layer of FlexGen's schedule."""

    kind: Literal["embedding", "attention", "mlp", "head"]
    values: int
    """Of its matrices."""
    host_bytes: float
    disk_bytes: float


# ---- one step


Lane = Literal["caller", "read", "up", "down", "written"]
"""What goes on at once: the thread that computes, device and CPU one after the other; reading the disk;
the link's two directions; writing the disk."""

Part = Literal["compute", "weights", "cache", "states", "stored"]

LANES: tuple[Lane, ...] = ("caller", "read", "up", "down", "written")
PARTS: tuple[Part, ...] = ("compute", "weights", "cache", "states", "stored")


@dataclass(slots=True)
class _Step:
    """What has to be done before the barrier, in seconds of each part on each lane."""

    taken_s: dict[tuple[Part, Lane], float] = field(default_factory=dict)

    def take(self, part: Part, lane: Lane, seconds: float) -> None:
        """Give a lane something to do."""
        if seconds:
            self.taken_s[part, lane] = self.taken_s.get((part, lane), 0.0) + seconds

    def alone_s(self, part: Part) -> float:
        """What a part takes, its own lanes side by side."""
        return max(self.taken_s.get((part, lane), 0.0) for lane in LANES)

    def seconds(self, *, overlaps: bool) -> float:
        """Until the barrier."""
        if not overlaps:
            return STEP_S + sum(map(self.alone_s, PARTS))
        busy_s = (sum(self.taken_s.get((part, lane), 0.0) for part in PARTS) for lane in LANES)
        return STEP_S + max(busy_s)


@dataclass(slots=True)
class Times:
    """How long a block takes, and what for."""

    prefill_s: float = 0.0
    decode_s: float = 0.0
    parts_s: dict[str, dict[str, float]] = field(
        default_factory=lambda: {"prefill": {}, "decode": {}}
    )
    """By phase, what each part would take alone."""

    def add(
        self, phase: Literal["prefill", "decode"], step: _Step, overlaps: bool, count: int
    ) -> None:
        """Count so many steps."""
        seconds = count * step.seconds(overlaps=overlaps)
        if phase == "prefill":
            self.prefill_s += seconds
        else:
            self.decode_s += seconds
        parts = self.parts_s[phase]
        for part in PARTS:
            parts[part] = parts.get(part, 0.0) + count * step.alone_s(part)

    @property
    def run_s(self) -> float:
        """Both phases."""
        return self.prefill_s + self.decode_s


class _Schedule:
    """All steps of one block."""

    def __init__(self, spec: ModelSpec, setting: Setting, machine: Machine) -> None:
        self._spec = spec
        self._setting = setting
        self._machine = machine
        if machine.up is None or machine.down is None or machine.host is None:
            raise UsageError(f"FlexGen needs a device with memory of its own, not {machine.name}")
        self._up, self._down, self._cpu = machine.up, machine.down, machine.host

    def times(self) -> Times:
        """The sum of all steps."""
        setting, total = self._setting, Times()
        layers = self._layers
        for token in range(GEN_LEN):
            for index, (layer, count) in enumerate(layers):
                after, _ = layers[(index + 1) % len(layers)]
                for batch in range(setting.num_batches):
                    step = self._step(token, layer, after, batch)
                    total.add("decode" if token else "prefill", step, setting.overlaps, count)
        return total

    @cached_property
    def _layers(self) -> list[tuple[_Layer, int]]:
        """All layers in order, and how many of a kind; the last decoder layer stands by itself,
        since the head comes after it.
        """
        h = self._spec.hidden_size
        ffn = 4 * h
        vocab, positions = self._spec.vocab_size, self._spec.max_positions + 2
        attention = self._layer("attention", [*[h * h, h] * 4, h, h])
        mlp = self._layer("mlp", [h * ffn, ffn, ffn * h, h, h, h])
        alike = len(self._spec.layers) - 1
        return [
            (self._layer("embedding", [vocab * h, positions * h]), 1),
            (attention, alike),
            (mlp, alike),
            (attention, 1),
            (mlp, 1),
            (self._layer("head", [h, h, vocab * h]), 1),
        ]

    def _layer(
        self, kind: Literal["embedding", "attention", "mlp", "head"], tensors: Sequence[int]
    ) -> _Layer:
        setting = self._setting
        item_bytes = PACKED_BYTES if setting.packs_weights else ITEM_BYTES
        placed = placement(tensors, *setting.percent[:2])
        return _Layer(
            kind=kind,
            values=sum(tensors),
            host_bytes=placed["host"] * item_bytes,
            disk_bytes=placed["disk"] * item_bytes,
        )

    def _step(self, token: int, layer: _Layer, after: _Layer, batch: int) -> _Step:
        setting, step = self._setting, _Step()
        if batch == 0:
            self._fetch_weights(step, after)
        is_last = batch == setting.num_batches - 1
        coming = after if is_last else layer
        if coming.kind == "attention" and token:
            self._fetch_cache(step, token)
        if layer.kind == "attention":
            self._store_cache(step, token)
        self._move_states(step, token)
        self._compute(step, layer, token)
        return step

    def _fetch_weights(self, step: _Step, layer: _Layer) -> None:
        self._from_disk(step, "weights", layer.disk_bytes)
        if self._setting.pinned:
            step.take("weights", "up", self._up.seconds(layer.host_bytes))
        else:
            step.take("weights", "caller", layer.host_bytes / UNPINNED_BYTES_PER_S)

    def _from_disk(self, step: _Step, part: Part, num_bytes: float) -> None:
        """To the device: a thread reads a tensor and then sends it, and all begin at once."""
        both_s = self._machine.disk_read.seconds(num_bytes) + self._up.seconds(num_bytes)
        step.take(part, "read", both_s)

    def _cache_bytes(self, columns: float) -> float:
        """Keys and values of a micro-batch in one layer."""
        item_bytes = PACKED_BYTES if self._setting.packs_cache else ITEM_BYTES
        return 2 * columns * self._spec.hidden_size * self._setting.batch_size * item_bytes

    @property
    def _far(self) -> tuple[float, float]:
        """Shares of the cache on host and disk."""
        device, host = (percent / 100 for percent in self._setting.percent[2:4])
        return host, 1 - device - host

    def _fetch_cache(self, step: _Step, token: int) -> None:
        """All columns there are, of the next micro-batch."""
        host, disk = self._far
        num_bytes = self._cache_bytes(self._setting.prompt_len + token)
        if self._setting.cpu:
            step.take("cache", "read", self._machine.disk_read.seconds(disk * num_bytes))
        else:
            self._from_disk(step, "cache", disk * num_bytes)
            step.take("cache", "caller", host * num_bytes / UNPINNED_BYTES_PER_S)

    def _store_cache(self, step: _Step, token: int) -> None:
        """What the micro-batch has added."""
        host, disk = self._far
        num_bytes = self._cache_bytes(1 if token else self._setting.prompt_len)
        step.take("stored", "written", self._machine.disk_write.seconds(disk * num_bytes))
        step.take("stored", "down", self._down.seconds(disk * num_bytes))
        step.take("stored", "down", host * num_bytes / CACHE_HOME_BYTES_PER_S)

    def _move_states(self, step: _Step, token: int) -> None:
        setting = self._setting
        columns = 1 if token else setting.prompt_len
        num_bytes = columns * setting.batch_size * self._spec.hidden_size * ITEM_BYTES
        away = 1 - setting.percent[4] / 100
        step.take("states", "up", self._up.seconds(away * num_bytes))
        step.take("states", "down", away * num_bytes / HIDDEN_HOME_BYTES_PER_S)

    def _compute(self, step: _Step, layer: _Layer, token: int) -> None:
        setting, device = self._setting, self._machine.device
        if layer.kind == "embedding":
            return
        tokens = setting.batch_size * (1 if token else setting.prompt_len)
        taken_s = device.product_s("float16", tokens, layer.values, streamed=False)
        if setting.packs_weights:  # for every micro-batch anew
            taken_s += device.decode_s("int4", layer.values)
        if layer.kind == "attention":
            taken_s += self._attention_s(token)
        step.take("compute", "caller", taken_s)

    def _attention_s(self, token: int) -> float:
        setting, device, hidden = self._setting, self._machine.device, self._spec.hidden_size
        seen = setting.prompt_len + token
        num_bytes = 2 * seen * hidden * setting.batch_size * ITEM_BYTES
        if not token:
            # Dense: every query meets every key, for a score and for a value.
            flops = 4 * hidden * setting.batch_size * setting.prompt_len**2
            packing_s = device.pack_s("int4", num_bytes) if setting.packs_cache else 0.0
            return flops / device.prompt_attention_flops_per_s + packing_s
        far = sum(self._far) if setting.cpu else 0.0
        unpacking_s = device.unpack_s("int4", num_bytes) if setting.packs_cache else 0.0
        return (
            device.cache_read_s(1, (1 - far) * num_bytes)
            + self._cpu.cache_read_s(1, far * num_bytes)
            + unpacking_s
        )


def times(spec: ModelSpec, setting: Setting, machine: Machine) -> Times:
    """How long FlexGen takes for one block of a model of OPT's kind on a machine."""
    return _Schedule(spec, setting, machine).times()

"""One machine's record, measured: what each number is stands in `planner.machine`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from flexport.backend import Backend
from flexport.bench.profile.attending import packed_cache_rates, prompt_rate, reading_rates
from flexport.bench.profile.kernels import (
    CODECS,
    Rated,
    decode_rate,
    lay_out_rate,
    memory_rate,
    packed_products,
    products,
    sample_rate,
)
from flexport.bench.profile.lanes import disk_file, link_lanes
from flexport.bench.profile.timing import Effort
from flexport.bench.profile.together import crossing_cost, shares
from flexport.bench.profile.visits import visit_costs
from flexport.bench.spread import Spread
from flexport.engine.known_machine import identity_of
from flexport.engine.limits import default_budgets
from flexport.planner.machine import Computer, Machine
from flexport.registry import CPU, open_backend

__all__ = ["measure_machine"]

QUIET_SHARE = 0.1
"""Of the cores: what others may take without anything being said of it."""


Say = Callable[[str], None]


def measure_machine(
    name: str,
    backend: Backend,
    directory: Path,
    effort: Effort | None = None,
    say: Say = lambda _: None,
) -> Machine:
    """The machine with `backend`, which is registered as `name`, and the disk of a folder.

    `name` may have the number of a device ("NAME:1"). Takes about a minute for each of the device and the CPU beside it, if it has memory of its own.
    Its files are gone in the end. Raises StorageError, DiskFull and OutOfMemory.
    """
    effort, others = effort or Effort(), _Others()
    facts = backend.capabilities
    directory.mkdir(parents=True, exist_ok=True)
    budgets = default_budgets(facts, (None, None, None), directory)
    effort = replace(effort, disk_bytes=min(effort.disk_bytes, budgets.disk_bytes // 4))
    told: dict[str, str] = {"": "measured"}

    say(f"the disk of {directory}")
    with disk_file(backend, directory, effort) as disk:
        disk_write, spread = disk.write_lane(effort)
        told["disk_write"] = _told(spread.spread)
        disk_read, spread = disk.read_lane(effort)
        told["disk_read"] = _told(spread.spread)
    say("computing while the disk is read")
    computing, reading = shares(backend, facts.dtypes[0], directory, disk_read, effort)
    told["computing_share"] = _told(computing.spread)
    told["reading_share"] = _told(reading.spread)
    up = down = None
    if not facts.addressable:
        say("copies between host and device")
        (up, up_spread), (down, down_spread) = link_lanes(backend, effort)
        told["up"], told["down"] = _told(up_spread.spread), _told(down_spread.spread)
    device = _computer(backend, "device", facts.dtypes, directory, effort, told, say)
    host, crossing_s = None, 0.0
    if not facts.unified:
        _, cpu = open_backend(CPU)
        with closing(cpu):
            host = _computer(cpu, "host", facts.dtypes, directory, effort, told, say)
            say("waiting for the CPU beside the device")
            crossing = crossing_cost(backend, cpu, facts.dtypes[0], directory, effort)
        crossing_s, told["crossing_s"] = crossing.median, _told(crossing.spread)
    identity = identity_of(name, directory, facts)
    share = others.share()
    told[""] = f"measured: while others took {100 * share:.0f} % of the cores"
    if share > QUIET_SHARE:
        say(
            f"others took {100 * share:.0f} % of the cores meanwhile: measure again when it is quiet"
        )
    return Machine(
        name=facts.name,
        about=f"{facts.name} of a machine with {identity['cores']} cores; disk {identity['disk']}",
        backend=name.partition(":")[0],
        dtypes=facts.dtypes,
        unified=facts.unified,
        addressable=facts.addressable,
        page_tokens=facts.page_tokens,
        device_bytes=budgets.device_bytes,
        host_bytes=budgets.host_bytes,
        disk_bytes=budgets.disk_bytes,
        disk_read=disk_read,
        disk_write=disk_write,
        up=up,
        down=down,
        device=device,
        host=host,
        crossing_s=crossing_s,
        computing_share=computing.median,
        reading_share=reading.median,
        sources=told,
        identity=identity,
    )


def _computer(
    backend: Backend,
    what: str,
    dtypes: Sequence[str],
    directory: Path,
    effort: Effort,
    told: dict[str, str],
    say: Say,
) -> Computer:
    """What computes; `told` learns how far measurements lie apart."""
    best = dtypes[0]

    def keep(field: str, spreads: Iterable[float]) -> None:
        told[f"{what}.{field}"] = _told(max(spreads, default=0.0))

    rated: dict[str, Rated] = {}
    for dtype in dtypes:
        say(f"{what}: products in {dtype}")
        rated[dtype] = products(backend, dtype, effort)
    decoded: dict[str, Spread] = {}
    for codec in CODECS:
        say(f"{what}: weights in {codec}")
        with torch.inference_mode():
            packed = packed_products(backend, codec, best, effort)
        if packed is not None:
            rated[codec] = packed
        decoded[codec] = decode_rate(backend, codec, best, effort)
    for field in ("products", "streamed_products"):
        keep(field, (each.spread for each in rated.values()))
    keep("decoded_values_per_s", (each.spread for each in decoded.values()))

    say(f"{what}: attention")
    prompt = prompt_rate(backend, best, effort)
    keep("prompt_attention_flops_per_s", [prompt.spread])
    steps = reading_rates(backend, best, effort)
    for field in ("cache_bytes_per_s", "page_s"):
        keep(field, [steps.spread])
    caches = {codec: packed_cache_rates(backend, codec, best, effort) for codec in CODECS}
    for index, field in enumerate(("unpacked_bytes_per_s", "packed_bytes_per_s")):
        keep(field, (both[index].spread for both in caches.values()))

    say(f"{what}: everything else")
    memory = memory_rate(backend, effort)
    keep("memory_bytes_per_s", [memory.spread])
    sampled = sample_rate(backend, best, effort)
    keep("sampled_values_per_s", [sampled.spread])
    laid_out = lay_out_rate(backend, best, effort)
    say(f"{what}: visits of a layer")
    visits = visit_costs(
        backend, best, directory, effort, rated[best].resident, steps, prompt.median
    )
    for field in ("visit_s", "piece_s", "touched_values_per_s", "stepped_values_per_s"):
        keep(field, [visits.spread])
    return Computer(
        products={form: each.resident for form, each in rated.items()},
        streamed_products={form: each.streamed for form, each in rated.items()},
        direct_rows={form: each.direct_rows for form, each in rated.items() if each.direct_rows},
        decoded_values_per_s=_medians(decoded),
        memory_bytes_per_s=memory.median,
        touched_values_per_s=visits.touched_values_per_s,
        stepped_values_per_s=visits.stepped_values_per_s,
        prompt_attention_flops_per_s=prompt.median,
        cache_bytes_per_s=steps.bytes_per_s,
        unpacked_bytes_per_s=_medians({codec: both[0] for codec, both in caches.items()}),
        packed_bytes_per_s=_medians({codec: both[1] for codec, both in caches.items()}),
        sampled_values_per_s=sampled.median,
        laid_out_values_per_s=laid_out.median if laid_out is not None else math.inf,
        visit_s=visits.visit_s,
        piece_s=visits.piece_s,
        page_s=steps.page_s,
        asynchronous=not backend.capabilities.addressable,
    )


class _Others:
    """What other programs do to the cores from when it is made."""

    def __init__(self) -> None:
        self._started = self._now()

    def share(self) -> float:
        """Of all cores' time since then, what went to others."""
        all_s, busy_s, own_s = (
            now - then for now, then in zip(self._now(), self._started, strict=True)
        )
        return min(1.0, max(0.0, (busy_s - own_s) / all_s)) if all_s > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds of all cores, those in which they were busy, and this process's."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle_s = times.idle + getattr(times, "iowait", 0.0)
        # A virtual machine's guests and its user time are the same seconds.
        twice_s = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
        all_s = sum(times) - twice_s
        return all_s, all_s - idle_s, own.user + own.system


def _medians(found: Mapping[str, Spread]) -> dict[str, float]:
    return {name: each.median for name, each in found.items()}


def _told(spread: float) -> str:
    return f"measured: within {100 * spread:.0f} %"

"""A run's report: what was asked, what was done, where the time and the bytes went."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from typing import Any

import psutil

import flexport
from flexport.engine.attempts import throughput
from flexport.engine.clock import Clock
from flexport.engine.plan import Plan
from flexport.engine.rows import Done
from flexport.engine.sparse_step import Sparsity
from flexport.engine.trace import HOST_COMPUTE
from flexport.policy import Tier
from flexport.store.store import Store

__all__ = ["report"]

KINDS = ("weights", "cache", "activations")


def report(
    *,
    plan: Plan,
    store: Store,
    clock: Clock,
    host_compute_s: float,
    lanes: Mapping[str, tuple[int, float]],
    load_s: float,
    total_s: float,
    done: Done,
    sparsity: Sparsity | None,
) -> dict[str, Any]:
    """The report as plain data. Sizes are bytes, times seconds.

    host_compute_s is how long the CPU beside the device computed; `lanes` has the bytes that each
    lane moved during the job, and the seconds it was busy.
    """
    seconds = {
        "load": load_s,
        "prefill": clock.prefill_s,
        "decode": clock.decode_s,
        "total": total_s + load_s,
    }
    tokens = {"prompt": done.prompt_tokens, "generated": done.generated_tokens}
    return {
        "model": plan.model,
        "backend": plan.backend,
        "dtype": plan.dtype,
        "policy": plan.policy.to_dict(),
        "placement": {kind: _placement(store, kind) for kind in KINDS},
        "peak_bytes": {
            "device": store.device.peak_bytes,
            "host": 0 if store.unified else store.host.peak_bytes,
            "disk": store.disk_peak_bytes,
        },
        "sparse_attention": {} if sparsity is None else sparsity.to_dict(),
        "moved_bytes": {name: moved for name, (moved, _) in lanes.items()},
        "seconds": seconds,
        "busy_seconds": {
            "compute": clock.compute_s,
            HOST_COMPUTE: host_compute_s,
            **{name: lane_busy_s for name, (_, lane_busy_s) in lanes.items()},
        },
        "wait_seconds": {"compute": clock.wait_s},
        "rows": done.num_rows,
        "tokens": tokens,
        "throughput": throughput(tokens, seconds),
        "predicted": plan.to_dict()["needs"] | plan.predicted.to_dict(),
        "plan": plan.to_dict(),
        "compression": dict(plan.compression),
        "machine": {
            "system": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "num_cores": os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
        },
        "version": flexport.__version__,
    }


def _placement(store: Store, kind: str) -> dict[str, dict[str, float]]:
    """Bytes that were given a home on each tier, and their shares."""
    placed = {tier: store.placed_bytes[kind, tier] for tier in Tier}
    total = sum(placed.values())
    return {
        tier.value: {"bytes": placed[tier], "share": placed[tier] / total if total else 0.0}
        for tier in Tier
    }

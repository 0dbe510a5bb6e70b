"""A machine of round numbers and a model of small ones, for sums that can be done by hand."""

from __future__ import annotations

from typing import Any

from flexport.planner.costs import Costs
from flexport.planner.footprint import JobSizes, LayerCaches, ModelSizes
from flexport.planner.machine import Computer, Curve, Lane, Machine
from flexport.planner.work import LayerWork, Matrices, ModelWork
from flexport.policy import Policy

__all__ = ["KIB", "LAYER_BYTES", "costs_of", "machine", "model", "work"]

KIB = 1 << 10
LAYER_BYTES = 1000 * KIB

CACHE = LayerCaches(
    num_layers=3,
    plane_token_bytes=4 * KIB,
    packings=(("int8", (140 * KIB, 140 * KIB)),),
)
"""Keys and values of 8 KiB a token; a group of 64 columns, 512 KiB, is packed in 280 KiB."""


def model(**changed: Any) -> ModelSizes:
    """Three decoder layers of 1000 KiB, tables and a head of as much."""
    values: dict[str, Any] = {
        "layer_bytes": (LAYER_BYTES,) * 5,
        "layer_slack_bytes": 0,
        "table_bytes": LAYER_BYTES,
        "expert_bytes": (0,) * 5,
        "one_expert_bytes": 0,
        "experts_picked": 0.0,
        "packed_scratch_bytes": 0,
        "expert_scratch_bytes": 0,
        "decoded_ratio": 1.0,
        "caches": (CACHE,),
        "hidden_token_bytes": 10,
        "work_token_bytes": 0,
        "head_token_bytes": 0,
        "score_bytes": 0,
        "crossing_token_bytes": 2 * 3000 + 8 * KIB,
        "projection_bytes": 3 * 300 * KIB,
        "projection_values": 3 * 300,
        "max_positions": 2048,
    }
    return ModelSizes(**values | changed)


def work(**changed: Any) -> ModelWork:
    """All three layers alike: 1000 values to be multiplied with, and a head of 500."""
    values: dict[str, Any] = {
        "num_layers": 3,
        "dense": Matrices(plain_values=1000),
        "touched_values": 70,
        "score_flops": 40,
        "queries": 1,
    }
    codec = changed.pop("codec", "none")
    return ModelWork(
        layers=(LayerWork(**values | changed),),
        order=(0, 0, 0),
        head=Matrices(plain_values=500),
        vocab_size=30,
        hidden_size=5,
        codec=codec,
    )


def computer(**changed: Any) -> Computer:
    """100 rows are multiplied as fast as 1; nothing is free but what is 0 here."""
    values: dict[str, Any] = {
        "products": {"float16": Curve(rows=(1, 100), flops_per_s=(2e3, 2e5))},
        "memory_bytes_per_s": 4e3,
        "touched_values_per_s": 7e2,
        "prompt_attention_flops_per_s": 4e3,
        "cache_bytes_per_s": {1: 1024.0 * KIB},
        "unpacked_bytes_per_s": {"int8": 512.0 * KIB},
        "packed_bytes_per_s": {"int8": 256.0 * KIB},
        "sampled_values_per_s": 60.0,
        "visit_s": 8.0,
    }
    return Computer(**values | changed)


def machine(**changed: Any) -> Machine:
    """A device with memory of its own, and a CPU that attends at half its rate."""
    values: dict[str, Any] = {
        "name": "round",
        "about": "for sums by hand",
        "backend": "cpu",
        "dtypes": ("float16",),
        "unified": False,
        "addressable": False,
        "page_tokens": 16,
        "device_bytes": 1 << 30,
        "host_bytes": 1 << 30,
        "disk_bytes": 1 << 40,
        "disk_read": Lane(bytes_per_s=100.0 * KIB, copy_s=0.5),
        "disk_write": Lane(bytes_per_s=50.0 * KIB),
        "up": Lane(bytes_per_s=1000.0 * KIB),
        "down": Lane(bytes_per_s=500.0 * KIB),
        "device": computer(),
        "host": computer(cache_bytes_per_s={1: 512.0 * KIB}),
        "crossing_s": 0.25,
        "sources": {"": "estimated: for tests"},
    }
    if changed.get("unified"):
        values |= {"addressable": True, "host": None, "up": None, "down": None}
    return Machine(**values | changed)


def costs_of(policy: Policy, **changed: Any) -> Costs:
    """The costs of a job of 100 prompt tokens and 33 new ones."""
    return Costs(
        changed.get("model", model()),
        changed.get("work", work()),
        changed.get("job", JobSizes(prompt_tokens=100, new_tokens=33)),
        policy,
        changed.get("machine", machine()),
        "float16",
    )

"""Machines to plan with where nobody has measured one."""

from __future__ import annotations

from flexport.backend import Capabilities
from flexport.planner.machine import Computer, Curve, Lane, Machine
from flexport.policy import Budgets

__all__ = ["typical"]


def typical(facts: Capabilities, backend: str, budgets: Budgets) -> Machine:
    """Two server cores, or a T4 beside them."""
    cores = Computer(
        products={
            form: Curve(
                rows=(1, 16, 64, 256, 1024),
                flops_per_s=tuple(scale * rate for rate in (2e10, 2.2e11, 5.5e11, 7e11, 8e11)),
            )
            for form, scale in (
                ("bfloat16", 1.0),
                ("float32", 0.25),
                ("float16", 0.25),
                ("int8", 1.8),
                ("int4", 0.4),
            )
        },
        direct_rows={"int8": 1 << 30, "int4": 64},
        decoded_values_per_s={"int4": 3e9, "int8": 5e9},
        memory_bytes_per_s=2.5e10,
        touched_values_per_s=1e9,
        prompt_attention_flops_per_s=2e11,
        cache_bytes_per_s={1: 2e10, 4: 1.2e10, 8: 7e9},
        unpacked_bytes_per_s={"int8": 1e10, "int4": 1e10},
        packed_bytes_per_s={"int8": 1e9, "int4": 1e9},
        sampled_values_per_s=1e9,
        visit_s=5e-4,
    )
    common = {
        "about": "not measured; run `flexport profile`",
        "backend": backend,
        "dtypes": facts.dtypes,
        "unified": facts.unified,
        "addressable": facts.addressable,
        "page_tokens": facts.page_tokens,
        "device_bytes": budgets.device_bytes,
        "host_bytes": 0 if facts.unified else budgets.host_bytes,
        "disk_bytes": budgets.disk_bytes,
        "disk_read": Lane(bytes_per_s=3e9),
        "disk_write": Lane(bytes_per_s=1e9),
        "sources": {"": "estimated"},
    }
    if facts.unified:
        link = None if facts.addressable else Lane(bytes_per_s=3e10)
        return Machine(
            name="two server cores",
            up=link,
            down=link,
            device=cores,
            host=None,
            computing_share=0.85,
            reading_share=0.9,
            **common,  # type: ignore[arg-type]
        )
    card = Computer(
        products={
            form: Curve(rows=(1, 64, 512), flops_per_s=(scale * 2e11, scale * 1e13, scale * 2.1e13))
            for form, scale in (("float16", 1.0), ("bfloat16", 1.0), ("float32", 0.25))
        },
        memory_bytes_per_s=2e11,
        touched_values_per_s=2e10,
        prompt_attention_flops_per_s=1e13,
        cache_bytes_per_s={1: 2e11},
        unpacked_bytes_per_s={"int8": 3e10, "int4": 3e10},
        sampled_values_per_s=2e10,
        visit_s=2e-4,
    )
    return Machine(
        name="a T4 and two server cores",
        up=Lane(bytes_per_s=1.2e10, copy_s=1e-5),
        down=Lane(bytes_per_s=1.2e10, copy_s=1e-5),
        device=card,
        host=cores,
        crossing_s=3e-4,
        **common,  # type: ignore[arg-type]
    )

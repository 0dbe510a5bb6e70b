"""The time that a job can't beat on a machine: its bytes at the disk's rate, its FLOPs at the
matrix rate, whichever takes longer.

limit_s = max(bytes streamed / disk rate, FLOPs / matrix rate), and a run's share of the limit is
limit_s over its prefill and decode seconds. Bytes written count at the rate of reading, which can
only make the limit stricter. FLOPs are 2 a matrix weight for every token that passes the decoder
layers, attention over the tokens before it, and the head for sampled tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flexport.bench.workload import Workload
from flexport.models.spec import ModelSpec
from flexport.models.tensors import attention_flops, layer_flops

__all__ = ["Limit", "limit_of", "work_flops"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How fast a job can be at best, and why not faster."""

    disk_s: float
    compute_s: float

    @property
    def limit_s(self) -> float:
        """Seconds of the slower of the two, if it never had to wait for the other."""
        return max(self.disk_s, self.compute_s)

    @property
    def limited_by(self) -> Literal["disk", "compute"]:
        """Which of the two that is."""
        return "disk" if self.disk_s > self.compute_s else "compute"

    def share(self, measured_s: float) -> float:
        """How much of the limit a run of so many seconds reached; 1 is all of it."""
        return self.limit_s / measured_s


def work_flops(spec: ModelSpec, work: Workload) -> int:
    """Multiplications and additions of all rows. A row's last token is sampled and goes no further."""
    passes = work.prompt_len + work.gen_len - 1
    body = sum(layer_flops(spec, layer) for layer in range(spec.head_layer))
    attention = sum(
        attention_flops(spec, layer, num_keys=token)
        for layer in range(spec.num_layers)
        for token in range(1, passes + 1)
    )
    head = work.gen_len * layer_flops(spec, spec.head_layer)
    return work.num_prompts * (passes * body + attention + head)


def limit_of(*, disk_bytes: int, flops: int, disk_bytes_per_s: float, flops_per_s: float) -> Limit:
    """The limit of a job that streams so many bytes from and to disk and computes so much."""
    return Limit(disk_s=disk_bytes / disk_bytes_per_s, compute_s=flops / flops_per_s)

"""`--policy auto`: as much as fits on the fastest tier, the rest spilled, the best block.

For each block size the nine shares follow from the budgets: what is filled first (cache or
weights) takes all it can of the device, then of the host, and what is left over goes to disk.
Of these policies the one with the most predicted tokens a second is taken. The prediction
needs only ratios to rank policies, so typical rates serve where nothing was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexport.errors import DoesNotFit
from flexport.planner.footprint import Footprint, JobSizes, ModelSizes, footprint
from flexport.policy import Budgets, Policy, Split
from flexport.units import format_bytes, parse_bytes

__all__ = ["Choice", "Rates", "check", "choose", "predicted_tok_s", "typical_rates"]

BLOCK_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BATCH_ROWS = 64
"""Rows of a micro-batch where pages of a block's cache take turns near the device. Where all of them
have room, one batch of the whole block is tried, too: a product of 192 rows takes half the time of
three of 64 if the weights stream, since the kernel rearranges them anew for each."""

PACED_BATCH_ROWS = 8
"""Rows of a micro-batch where prompts are paced: few, since all of them wait for the last one's
prompt; not too few, since each batch costs some kernel calls of its own in every layer."""

PACED_BATCHES = 4
"""Batches that pacing needs at least: one of them is always being prefilled."""

PACED_SHARE = 0.95
"""What pacing is taken to reach of its predicted speed: those kernel calls are not in it."""

WORTH = 1.05
"""A larger paced block has to be so much faster: its rows take space and writes on disk."""

STEPS = 14
"""Halvings in a search for a share: exact to 1/16384, far below one row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the machine's lanes do, as far as ranking policies needs it."""

    disk_bytes_per_s: float = 3e9
    """An NVMe disk; also what the project's own CI machines read at while they compute."""
    link_bytes_per_s: float = 12e9
    """PCIe 3.0 x16, as FlexGen's T4 had it (arXiv:2303.06865, table 1)."""
    memory_bytes_per_s: float = 9e9
    """What attention reads the cache at, its kernel calls included."""
    flops_per_s: float = 7e11
    """Two server cores with bfloat16 instructions."""
    half_rows: int = 16
    """Rows of a product at which the matrix kernel reaches half its rate."""
    host_memory_bytes_per_s: float = 20e9
    """What the CPU beside a device reads a cache at: two cores' decode attention."""
    host_flops_per_s: float = 4e11
    """What it multiplies at, of a few rows: two server cores with bfloat16 instructions."""
    unpack_bytes_per_s: float = 1e10
    """What a packed cache is unpacked at, in bytes of what becomes of it."""
    host_unpack_bytes_per_s: float = 1e10
    crossing_s: float = 3e-4
    """What a layer takes longer because the device waits for the CPU: two short copies, and the
    host finding out that the first is done."""


def typical_rates(unified: bool) -> Rates:
    """Rates for machines that nobody has measured: two server cores, or a T4 beside them.

    A T4 reads memory at 320 GB/s and multiplies at 65 TFLOP/s (NVIDIA's datasheet); FlexGen's
    cost model, fitted on one, has 21 TFLOP/s for prompts.
    """
    if unified:
        return Rates()
    return Rates(memory_bytes_per_s=2e11, flops_per_s=2.1e13, half_rows=64, unpack_bytes_per_s=3e10)


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the caller has fixed; None leaves it to the search."""

    weights: Split | None = None
    cache: Split | None = None
    activations: Split | None = None
    batch_size: int | None = None
    num_batches: int | None = None
    prefill_tokens: int | None = None
    sweep_tokens: int | None = None
    cpu_attention: bool | None = None
    cpu_projections: bool | None = None
    compress_weights: str = "none"
    compress_cache: str = "none"
    attn_sparsity: float = 1.0
    """None of these is chosen: they change the answers."""


def choose(
    model: ModelSizes,
    job: JobSizes,
    budgets: Budgets,
    *,
    page_tokens: int,
    unified: bool,
    addressable: bool = True,
    fixed: Choice | None = None,
    rates: Rates | None = None,
) -> Policy:
    """The best policy that fits. Raises DoesNotFit, with the smallest memory that would do.

    Where memory is unified nothing is homed on the host: it would take the same bytes there.
    """
    fixed, rates = fixed or Choice(), rates or typical_rates(unified)

    def needs(policy: Policy) -> Footprint:
        return footprint(model, job, policy, page_tokens, unified, addressable)

    def fits(policy: Policy) -> bool:
        return within(needs(policy), budgets)

    best: tuple[float, Policy] | None = None
    for block in _blocks(model, job, fixed):
        # A byte of weights in memory spares one in every sweep, one of the cache a little less.
        for cache_first in (False, True):
            for policy in _candidates(block, fixed, cache_first, unified, fits):
                score = predicted_tok_s(model, job, policy, rates, unified)
                worth = WORTH if policy.sweep_tokens else 1.001
                if best is None or score > best[0] * worth:
                    best = (score, policy)
    if best is None:
        smallest = min(
            _smallest(next(_blocks(model, job, fixed)), fixed),
            key=lambda policy: _missing_bytes(needs(policy), budgets),
        )
        raise _refusal(needs(smallest), smallest, budgets)
    return best[1]


def check(needs: Footprint, policy: Policy, budgets: Budgets) -> None:
    """Raise DoesNotFit, with the numbers, unless the budgets hold what the policy needs."""
    if not within(needs, budgets):
        raise _refusal(needs, policy, budgets)


def within(needs: Footprint, budgets: Budgets) -> bool:
    """Whether each tier has room."""
    memory_bytes = budgets.device_bytes + (budgets.host_bytes if needs.unified else 0)
    return (
        needs.device_bytes <= memory_bytes
        and needs.host_bytes <= budgets.host_bytes
        and needs.disk_bytes <= budgets.disk_bytes
    )


def predicted_tok_s(
    model: ModelSizes, job: JobSizes, policy: Policy, rates: Rates, unified: bool
) -> float:
    """Generated tokens a second of the whole job, if every lane runs at its rate."""
    sweeps = _Sweeps(model, job, policy, rates, unified)
    return sweeps.paced_tok_s() if policy.sweep_tokens else sweeps.lockstep_tok_s()


@dataclass(frozen=True, slots=True)
class _Sweeps:
    """How long sweeps of one policy take. All rows are as long as the job's longest one."""

    model: ModelSizes
    job: JobSizes
    policy: Policy
    rates: Rates
    unified: bool

    def lockstep_tok_s(self) -> float:
        """All rows of a block are prefilled in one sweep, and then decoded step by step."""
        job, policy = self.job, self.policy
        rows = policy.block_size if job.num_rows is None else min(policy.block_size, job.num_rows)
        prompt_tokens = rows * job.prompt_tokens
        prompts_s = self.sweep_s(prompt_tokens, 0, min(policy.visit_tokens, prompt_tokens))
        step_s = self.sweep_s(0, rows, min(policy.batch_size, rows))
        return rows * job.new_tokens / (prompts_s + (job.new_tokens - 1) * step_s)

    def paced_tok_s(self) -> float:
        """Each sweep takes in some rows and decodes those that came before."""
        job, policy = self.job, self.policy
        steps = max(1, job.new_tokens - 1)
        # A batch decodes when all its rows are prefilled, so one of the slots does not.
        decoded = max(policy.block_size - policy.batch_size, policy.block_size / 2)
        rows_a_sweep = min(policy.sweep_tokens / job.prompt_tokens, decoded / steps)
        prompt_tokens = rows_a_sweep * job.prompt_tokens
        full_s = self.sweep_s(prompt_tokens, decoded, prompt_tokens + decoded)
        if job.num_rows is None:
            return PACED_SHARE * rows_a_sweep * job.new_tokens / full_s
        # The first rows find the slots empty, and the last ones leave them so.
        first = min(job.num_rows, decoded)
        filling, full = first / rows_a_sweep, (job.num_rows - first) / rows_a_sweep
        filling_s = self.sweep_s(prompt_tokens, first / 2, prompt_tokens + first / 2)
        last = max(0.0, job.num_rows * steps - full * decoded - filling * first / 2) / steps
        total_s = filling * filling_s + full * full_s + steps * self.sweep_s(0, last, last)
        return PACED_SHARE * job.num_rows * job.new_tokens / total_s

    def sweep_s(self, prompt_tokens: float, rows: float, product_tokens: float) -> float:
        """A sweep that prefills so many tokens and decodes so many rows.

        `product_tokens` pass one matrix product together.
        """
        model, policy, rates = self.model, self.policy, self.rates
        mean_tokens = self.job.prompt_tokens + self.job.new_tokens / 2
        kept = model.kept_in(policy.compress_cache)
        cache_bytes = rows * kept.seen_bytes(mean_tokens)
        # From disk whole grains come, in which there may be a chosen value of any head.
        linked_bytes = rows * kept.seen_bytes(mean_tokens, policy.attn_sparsity)
        attended_bytes = rows * model.seen_bytes(mean_tokens)
        stream_bytes = model.streamed_bytes(prompt_tokens + rows)
        disk_bytes = policy.weights.disk * stream_bytes + policy.cache.disk * cache_bytes
        efficiency = product_tokens / (product_tokens + rates.half_rows)
        flops = (prompt_tokens + rows) * model.token_flops
        num_crossings = 0
        link_bytes = attended_on_host_bytes = host_s = 0.0
        if not self.unified:
            weights, cache = policy.weights, policy.cache
            link_bytes = (weights.disk + weights.host) * stream_bytes
            far_bytes = (cache.disk + cache.host) * linked_bytes
            if policy.attn_sparsity < 1 and cache.device < 1 and not policy.cpu_attention:
                num_crossings += model.num_layers  # the host waits to hear what was chosen
            if policy.cpu_attention:
                attended_on_host_bytes = (cache.disk + cache.host) * attended_bytes
                num_crossings += model.num_layers
                crossing_rows = (cache.disk + cache.host) * rows
                far_bytes = crossing_rows * model.crossing_token_bytes * model.num_layers
            link_bytes += far_bytes
            if policy.cpu_projections and not prompt_tokens:
                # Where a layer is cut, these matrices are the first to be on the host.
                share = min(1.0, weights.host * model.stream_bytes / model.projection_bytes)
                num_crossings += model.num_layers
                link_bytes -= share * model.projection_bytes
                host_s = share * rows * model.projection_flops / rates.host_flops_per_s
                flops -= share * rows * model.projection_flops
        byte_s, host_byte_s = 1 / rates.memory_bytes_per_s, 1 / rates.host_memory_bytes_per_s
        if policy.compress_cache != "none":
            byte_s += 1 / rates.unpack_bytes_per_s
            host_byte_s += 1 / rates.host_unpack_bytes_per_s
        attention_s = max(
            (attended_bytes - attended_on_host_bytes) * byte_s,
            attended_on_host_bytes * host_byte_s,
        )
        return max(
            disk_bytes / rates.disk_bytes_per_s,
            link_bytes / rates.link_bytes_per_s,
            flops / max(1.0, rates.flops_per_s * efficiency)
            + attention_s
            + host_s
            + num_crossings * rates.crossing_s,
        )


def _blocks(model: ModelSizes, job: JobSizes, fixed: Choice) -> Iterator[Policy]:
    """Policies of each block shape to be tried, smallest first, everything on disk."""
    everything = Split(device=0.0, disk=1.0)
    default_tokens = min(2048, max(256, model.max_positions))
    prefill_tokens = fixed.prefill_tokens or default_tokens
    most = job.num_rows or max(BLOCK_SIZES)
    sizes = sorted({*(size for size in BLOCK_SIZES if size < most), min(most, BLOCK_SIZES[-1])})
    shapes = {
        shape
        for size in sizes
        for shape in (
            _lockstep(size, fixed, BATCH_ROWS),
            _lockstep(size, fixed, size),
            _paced(size, job, fixed),
        )
        if shape is not None
    }
    for batch_size, num_batches, sweep_tokens in sorted(
        shapes, key=lambda shape: (shape[0] * shape[1], shape[2])
    ):
        yield Policy(
            weights=fixed.weights or everything,
            cache=fixed.cache or everything,
            activations=fixed.activations or Split(),
            batch_size=batch_size,
            num_batches=num_batches,
            prefill_tokens=prefill_tokens,
            sweep_tokens=sweep_tokens,
            compress_weights=fixed.compress_weights,
            compress_cache=fixed.compress_cache,
            attn_sparsity=fixed.attn_sparsity,
        )


def _lockstep(size: int, fixed: Choice, most_rows: int) -> tuple[int, int, int]:
    """Batch size, number of batches and sweep tokens of a block that goes step by step."""
    batch_size = fixed.batch_size or min(most_rows, -(-size // (fixed.num_batches or 1)))
    num_batches = fixed.num_batches or max(1, -(-size // (fixed.batch_size or most_rows)))
    return batch_size, num_batches, fixed.sweep_tokens or 0


def _paced(size: int, job: JobSizes, fixed: Choice) -> tuple[int, int, int] | None:
    """The same of one whose rows come and go all the time, if there can be one."""
    if fixed.sweep_tokens is not None or job.new_tokens < 2:
        return None
    if fixed.compress_cache != "none":
        return None  # a policy refuses to have both
    batch_size = fixed.batch_size or min(PACED_BATCH_ROWS, max(1, size // PACED_BATCHES))
    num_batches = fixed.num_batches or size // batch_size
    if num_batches < PACED_BATCHES:
        return None
    # What comes in at this pace is what ends, when all slots are in use.
    rows_a_sweep = (num_batches - 1) * batch_size / (job.new_tokens - 1)
    return batch_size, num_batches, math.ceil(rows_a_sweep * job.prompt_tokens)


def _candidates(
    block: Policy,
    fixed: Choice,
    cache_first: bool,
    unified: bool,
    fits: Callable[[Policy], bool],
) -> Iterator[Policy]:
    """Policies of one block that fit, the CPU beside the device doing the least first."""
    free = (False,) if unified else (False, True)
    for attends in free if fixed.cpu_attention is None else (fixed.cpu_attention,):
        asked = replace(block, cpu_attention=attends)
        policy = _filled(asked, fixed, cache_first, unified, fits)
        for projects in free if fixed.cpu_projections is None else (fixed.cpu_projections,):
            candidate = replace(policy, cpu_projections=projects)
            if fits(candidate):
                yield candidate
        if policy.cache.device == 1:
            return  # there is no cache that the CPU could attend to


def _filled(
    policy: Policy,
    fixed: Choice,
    cache_first: bool,
    unified: bool,
    fits: Callable[[Policy], bool],
) -> Policy:
    """Move all that fits from disk to memory, the kind named first as far as it goes."""
    order = ("cache", "weights") if cache_first else ("weights", "cache")
    for tier in ("device",) if unified else ("device", "host"):
        for kind in order:
            if getattr(fixed, kind) is None:
                policy = _raised(policy, kind, tier, fits)
    return policy


def _raised(policy: Policy, kind: str, tier: str, fits: Callable[[Policy], bool]) -> Policy:
    """The largest share of `kind` on `tier`, taken from its disk share."""
    split: Split = getattr(policy, kind)

    def moved(share: float) -> Policy:
        shares: Mapping[str, float] = {
            "device": split.device, "host": split.host, "disk": split.disk - share
        }  # fmt: skip
        changed: dict[str, Any] = {kind: Split(**{**shares, tier: shares[tier] + share})}
        return replace(policy, **changed)

    if fits(moved(split.disk)):
        return moved(split.disk)
    low, high = 0.0, split.disk
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(moved(middle)) else (low, middle)
    return moved(low)


def _smallest(block: Policy, fixed: Choice) -> list[Policy]:
    """The policies that may take least; a short row's cache is smaller than its way to disk."""
    if fixed.cache is not None:
        return [block]
    return [block, replace(block, cache=Split()), replace(block, cache=Split(device=0, host=1))]


def _missing_bytes(needs: Footprint, budgets: Budgets) -> int:
    """How far the budgets of all tiers together are from what is needed."""
    memory_bytes = budgets.device_bytes + (budgets.host_bytes if needs.unified else 0)
    return (
        max(0, needs.device_bytes - memory_bytes)
        + max(0, needs.host_bytes - budgets.host_bytes)
        + max(0, needs.disk_bytes - budgets.disk_bytes)
    )


def _enough(num_bytes: int) -> str:
    """A size for people that is not below num_bytes when it is typed in again."""
    shown_bytes = num_bytes
    while parse_bytes(format_bytes(shown_bytes)) < num_bytes:
        shown_bytes += max(1, num_bytes // 500)
    return format_bytes(shown_bytes)


def _refusal(needs: Footprint, policy: Policy, budgets: Budgets) -> DoesNotFit:
    memory_bytes = budgets.device_bytes + (budgets.host_bytes if needs.unified else 0)
    lines = []
    for tier, needed, found in (
        ("device", needs.device_bytes, memory_bytes),
        ("host", needs.host_bytes, budgets.host_bytes),
        ("disk", needs.disk_bytes, budgets.disk_bytes),
    ):
        if needed > found:
            lines.append(
                f"--{tier}-memory is {format_bytes(found)}, and it takes {_enough(needed)}"
            )
    return DoesNotFit(
        f"the budgets are too small for {policy.batch_size} x {policy.num_batches} rows: "
        + "; ".join(lines)
    )

"""Half a block: what a job goes on with when memory ran out in the middle of it."""

from __future__ import annotations

from dataclasses import replace

from flexport.planner.footprint import Footprint, JobSizes
from flexport.policy import Budgets, Policy

__all__ = ["halved", "left_over"]

FEWEST_TOKENS = 128
"""Of a visit: below this a matrix kernel is far from its rate, and has little left to give up."""


def halved(policy: Policy, job: JobSizes) -> Policy | None:
    """The policy with half the rows in flight and the same shares; None if there is only one row.

    Batches go first, since products of many rows are the faster ones, then the rows of a batch.
    The tokens of a visit are halved with them, since what kernels need beside their results grows
    with these, and the pace of a paced block, which is to stay in proportion. But prompts that
    were computed whole stay whole: pieces of one look back at its cache. So on no tier does it
    take more than before.
    """
    rows = policy.block_size if job.num_rows is None else min(policy.block_size, job.num_rows)
    if rows <= 1:
        return None
    batch_size = min(policy.batch_size, rows)
    num_batches = -(-rows // batch_size)
    if num_batches > 1:
        num_batches //= 2
    else:
        batch_size //= 2
    is_whole = job.prompt_tokens <= policy.visit_tokens and not policy.sweep_tokens
    fewest = max(FEWEST_TOKENS, job.prompt_tokens if is_whole else 0)
    return replace(
        policy,
        batch_size=batch_size,
        num_batches=num_batches,
        prefill_tokens=min(policy.prefill_tokens, max(fewest, policy.prefill_tokens // 2)),
        sweep_tokens=-(-policy.sweep_tokens // 2),
    )


def left_over(
    budgets: Budgets, held_bytes: tuple[int, int], before: Footprint, after: Footprint
) -> Budgets:
    """What a smaller block may take of memory, after a larger one ran out of it.

    What was held of device and host by then is all that there is, so far as one can tell. Of
    that, what the smaller block spares stays free for whatever found no room; were it filled
    again, with layers fetched ahead, nothing would be won.
    """
    device_bytes, host_bytes = (
        max(needed, held - (needed_before - needed))
        for held, needed_before, needed in zip(
            held_bytes,
            (before.device_bytes, before.host_bytes),
            (after.device_bytes, after.host_bytes),
            strict=True,
        )
    )
    return Budgets(
        device_bytes=device_bytes,
        host_bytes=0 if after.unified else host_bytes,
        disk_bytes=budgets.disk_bytes,
    )

"""What does not fit: how much is missing, and the smallest budgets that would do."""

from __future__ import annotations

from flexport.errors import DoesNotFit
from flexport.planner.footprint import Footprint
from flexport.policy import Budgets, Policy
from flexport.units import format_bytes, parse_bytes

__all__ = ["check", "missing_bytes", "refusal", "room_bytes", "within"]


def check(needs: Footprint, policy: Policy, budgets: Budgets) -> None:
    """Raise DoesNotFit, with the numbers, unless the budgets hold what the policy needs."""
    if not within(needs, budgets):
        raise refusal(needs, policy, budgets)


def within(needs: Footprint, budgets: Budgets) -> bool:
    """Whether each tier has room."""
    return missing_bytes(needs, budgets) == 0


def missing_bytes(needs: Footprint, budgets: Budgets) -> int:
    """How far the budgets of all tiers together are from what is needed."""
    return sum(max(0, needed - found) for _, needed, found in _tiers(needs, budgets))


def room_bytes(needs: Footprint, budgets: Budgets) -> int:
    """Memory near the device for what is fetched ahead: what is kept for it, and what is left over."""
    _, _, found = _tiers(needs, budgets)[0]
    return needs.staging_bytes[0] + max(0, found - needs.device_bytes)


def refusal(needs: Footprint, policy: Policy, budgets: Budgets) -> DoesNotFit:
    """The error that says of each tier what was found and what would do."""
    lines = [
        f"--{tier}-memory is {format_bytes(found)}, and it takes {_enough(needed)}"
        for tier, needed, found in _tiers(needs, budgets)
        if needed > found
    ]
    return DoesNotFit(
        f"the budgets are too small for {policy.batch_size} x {policy.num_batches} rows: "
        + "; ".join(lines)
    )


def _tiers(needs: Footprint, budgets: Budgets) -> list[tuple[str, int, int]]:
    """Of each tier, what is needed of it and what there is."""
    memory_bytes = budgets.device_bytes + (budgets.host_bytes if needs.unified else 0)
    return [
        ("device", needs.device_bytes, memory_bytes),
        ("host", needs.host_bytes, budgets.host_bytes),
        ("disk", needs.disk_bytes, budgets.disk_bytes),
    ]


def _enough(num_bytes: int) -> str:
    """A size for people that is not below num_bytes when it is typed in again."""
    shown_bytes = num_bytes
    while parse_bytes(format_bytes(shown_bytes)) < num_bytes:
        shown_bytes += max(1, num_bytes // 500)
    return format_bytes(shown_bytes)

"""What a run that has ended could have done better, and the option that would do it.

Each warning needs all it says to be true of the report, and a run that was long enough to tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flexport.engine.comparison import LANES, run_s
from flexport.engine.machines import Numbers
from flexport.units import format_bytes

__all__ = ["warnings"]

LONG_S = 20.0
"""Sweeps that took less are mostly beginning and end, and first calls of kernels."""

FREE = 0.25
"""Of a budget: what is worth a word if it was never used. A plan is an upper bound, and keeps some
of what it is given for what may come."""

WAITS = 0.2
"""Of the run: what is waited for less than that can't be worth moving."""

MOSTLY = 0.5

OFF = 1.3
"""Times as long as predicted, or as short."""


def warnings(
    report: Mapping[str, Any], *, numbers: Numbers, asked: bool, packed: bool
) -> list[str]:
    """What there is to say about a report that has a `comparison`.

    `asked` is whether it was asked for where things live; a plan that was free to choose has its
    reasons for what it leaves unused. `packed` is whether weights are as their checkpoint packs
    them, which can't be compressed further.
    """
    measured, ratio = report["comparison"]["measured"], report["comparison"]["ratio"]
    if run_s(measured) < LONG_S:
        return []
    waited = measured["wait_seconds"]["compute"] / run_s(measured)
    found: list[str] = []
    if asked and waited > WAITS:
        found += _unused(report)
    if waited > MOSTLY:
        found.append(_waited(report, waited, packed=packed))
    if ratio is not None and not 1 / OFF <= ratio <= OFF:
        found.append(_off(ratio, numbers))
    return found


def _unused(report: Mapping[str, Any]) -> Iterator[str]:
    """Of each tier with room to spare, while something of lower tiers had room in it."""
    budgets, needs = report["plan"]["budgets"], report["plan"]["needs"]
    tiers = ["device", "host"]
    room = {tier: budgets[f"{tier}_bytes"] for tier in tiers}
    if report["plan"]["unified"]:
        tiers, room = ["device"], {"device": room["device"] + room["host"]}
    for index, tier in enumerate(tiers):
        used = max(report["peak_bytes"][tier], needs[f"{tier}_bytes"])
        lower = [*tiers[index + 1 :], "disk"]
        away = [
            (num_bytes, words)
            for kind, words in (("weights", "weights"), ("cache", "KV cache"))
            for num_bytes in (sum(report["placement"][kind][each]["bytes"] for each in lower),)
            if num_bytes
        ]
        if room[tier] - used > FREE * room[tier] and away:
            others = " and ".join(f"{format_bytes(size)} of {words}" for size, words in away)
            yield (
                f"{format_bytes(room[tier] - used)} of the {format_bytes(room[tier])} of {tier} memory "
                f"were never used, while {others} came from further away: --policy auto, or larger "
                "shares in --percent, would keep more there"
            )


def _waited(report: Mapping[str, Any], waited: float, *, packed: bool) -> str:
    busy_s, policy = report["comparison"]["measured"]["busy_seconds"], report["policy"]
    lane = max(("disk_to_host", "host_to_device"), key=lambda each: busy_s[each])
    tiers = ("disk",) if lane == "disk_to_host" else ("disk", "host")
    ways = []
    if any(policy["weights"][tier] for tier in tiers):
        if policy["compress_weights"] == "none" and not packed:
            ways.append("--compress-weights int8 halves the weights on that way")
        beside = lane == "disk_to_host" and not report["plan"]["unified"]
        memory = "--device-memory or --host-memory" if beside else "--device-memory"
        ways.append(f"more {memory} keeps more of them near")
        if report["rows"] > policy["batch_size"] * policy["num_batches"]:
            ways.append("a larger block (--num-batches) lets more rows share them")
    if any(policy["cache"][tier] for tier in tiers):
        if policy["compress_cache"] == "none":
            ways.append("--compress-cache int8 about halves the KV cache on that way")
        ways.append("a smaller block (--num-batches) needs less cache at once")
    advice = f": {'; '.join(ways)}" if ways else ""
    return f"computing waited for {100 * waited:.0f} % of the time, most of all for {LANES[lane]}{advice}"


def _off(ratio: float, numbers: Numbers) -> str:
    took = (
        f"{ratio:.1f} times as long as"
        if ratio > 1
        else f"{100 * ratio:.0f} % of the time that was"
    )
    if numbers == "typical":
        return (
            f"the run took {took} predicted by a typical machine's numbers; `flexport profile` "
            "measures this one"
        )
    return (
        f"the run took {took} predicted: something else may have used the machine, or its numbers "
        "no longer hold, and then `flexport profile` measures it anew"
    )

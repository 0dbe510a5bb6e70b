"""How long a job takes under a policy: a closed form, quick enough for a search.

Every sweep over the layers moves some bytes on each lane and computes for some seconds, and all
of this goes on at once; so a sweep takes as long as the busiest of them. The sums come from
`costs`, for a typical visit of each sweep, with all rows as long as the job's mean row. Where there is
too little room to fetch much ahead, a layer's visits are followed one by one. What the
closed form leaves out (how sweeps begin and end, layers that differ) is what the simulator has.

Source: a job's time as the sum over sweeps of the slowest of its lanes is FlexGen's cost model,
arXiv:2303.06865, section 4.3, with its barriers left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flexport.planner.costs import LANES, Costs, Prompts, Steps, Visit, VisitCost

__all__ = ["COMPUTE", "HOST_COMPUTE", "Prediction", "Sweep", "predict", "prediction_of", "sweeps"]

COMPUTE = "compute"
HOST_COMPUTE = "host_compute"

SETTLED_LAYERS = 4
"""Layers after which one takes as long as the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a job will take."""

    prefill_s: float
    decode_s: float
    load_s: float
    """Until the first sweep begins: reading what stays, and bringing it into the kernels' layout."""
    new_tokens: float
    """All that are generated."""
    busy_s: Mapping[str, float] = field(default_factory=dict)
    """By lane, computing among them, what it has to do."""
    moved_bytes: Mapping[str, float] = field(default_factory=dict)
    block_s: float = 0.0
    """From the first prompt of a block, or of a micro-batch where rows come and go all the time, to
    its last token: how long one waits for an answer."""
    machine: str = ""
    """Whose numbers these are."""

    @property
    def run_s(self) -> float:
        """All sweeps."""
        return self.prefill_s + self.decode_s

    @property
    def tok_s(self) -> float:
        """Generated tokens a second of the sweeps, as the report counts them."""
        return self.new_tokens / self.run_s if self.run_s > 0 else 0.0

    @property
    def limited_by(self) -> str:
        """The lane that has most to do."""
        return max(self.busy_s, key=lambda lane: self.busy_s[lane])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, under the report's names."""
        return {
            "generation_tok_s": self.tok_s,
            "seconds": {
                "load": self.load_s,
                "prefill": self.prefill_s,
                "decode": self.decode_s,
                "total": self.load_s + self.run_s,
            },
            "busy_seconds": dict(self.busy_s),
            "moved_bytes": dict(self.moved_bytes),
            "limited_by": self.limited_by,
            "machine": self.machine,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Sweeps over the layers that are alike."""

    cost: VisitCost
    """Of one of them, all its visits together."""
    times: float
    """How many the job has."""
    block_times: float
    """How many a block passes from its first prompt to its last token."""
    layer: tuple[VisitCost, VisitCost, int]
    """The first visit of the commonest layer, the others, and how many there are in all."""
    layers: int
    """How many layers are like that."""
    prompt_share: float
    """Of its time, what counts as prefill."""

    @property
    def ample_bytes(self) -> float:
        """Memory near the device with which nothing waits for room: two layers' weights, one's pages.

        0 where layers are passed in one visit, or where only weights come: they have room enough.
        """
        first, other, num_visits = self.layer
        if num_visits == 1:
            return 0.0
        pages_bytes = num_visits * other.staged_bytes
        return 2 * first.staged_bytes + pages_bytes if pages_bytes else 0.0


def predict(costs: Costs, room_bytes: float = math.inf) -> Prediction:
    """The prediction for the job and policy that `costs` are of.

    `room_bytes` is the memory near the device that what is fetched ahead may take.
    """
    total, prefill_s, decode_s, block_s = VisitCost(), 0.0, 0.0, 0.0
    for sweep in sweeps(costs):
        total.add(sweep.cost, sweep.times)
        sweep_s = costs.sweep_s(sweep.cost) + _stalled_s(costs, sweep, room_bytes)
        prefill_s += sweep.prompt_share * sweep.times * sweep_s
        decode_s += (1 - sweep.prompt_share) * sweep.times * sweep_s
        block_s += sweep.block_times * sweep_s
    job = costs.job
    new_tokens = (job.num_rows or costs.policy.block_size) * job.mean_new
    return prediction_of(costs, total, prefill_s, decode_s, new_tokens, block_s)


def sweeps(costs: Costs) -> list[Sweep]:
    """All sweeps of the job; of one block, as long as nobody knows how many rows there are."""
    rows = costs.job.num_rows or costs.policy.block_size
    return list(_paced(costs, rows) if costs.policy.sweep_tokens else _lockstep(costs, rows))


def prediction_of(
    costs: Costs,
    total: VisitCost,
    prefill_s: float,
    decode_s: float,
    new_tokens: float,
    block_s: float,
) -> Prediction:
    """The prediction of a job whose visits come to `total`."""
    busy_s = {COMPUTE: total.compute_s}
    if costs.machine.host is not None:
        busy_s[HOST_COMPUTE] = total.host_s
    busy_s |= {lane: costs.lane_s(lane, total) for lane in LANES}
    return Prediction(
        prefill_s=prefill_s,
        decode_s=decode_s,
        load_s=costs.load_s,
        new_tokens=new_tokens,
        busy_s=busy_s,
        moved_bytes={lane: total.moved_bytes.get(lane, 0.0) for lane in LANES},
        block_s=block_s,
        machine=costs.machine.name,
    )


# ---- all rows of a block step by step


def _lockstep(costs: Costs, rows: int) -> Iterator[Sweep]:
    """Of each block one sweep of prompts, and then decode steps; the last block may be smaller."""
    full, rest = divmod(rows, costs.policy.block_size)
    steps = max(0.0, costs.job.mean_new - 1)
    for own_rows, blocks, is_largest in (
        (costs.policy.block_size, full, True),
        (rest, 1, not full),
    ):
        if not own_rows or not blocks:
            continue
        yield Sweep(
            **_of_visits(costs, _prompt_visits(costs, own_rows)),
            times=blocks,
            block_times=1.0 if is_largest else 0.0,
            prompt_share=1.0,
        )
        if steps:
            yield Sweep(
                **_of_visits(costs, [_steps(costs, own_rows)]),
                times=blocks * steps,
                block_times=steps if is_largest else 0.0,
                prompt_share=0.0,
            )


def _prompt_visits(costs: Costs, rows: int) -> list[tuple[Visit, float]]:
    """The visits of a layer that take so many rows' prompts through it, alike ones together."""
    policy = costs.policy
    length, most = costs.job.mean_prompt, policy.visit_tokens
    num_batches = math.ceil(rows / policy.batch_size)
    if length > most:
        chunks = math.ceil(length / most)
        size = length / chunks
        return [
            (
                Visit(
                    prompts=(Prompts(rows=1, begin=size * at, end=size * (at + 1)),),
                    sampled=1.0 if at == chunks - 1 else 0.0,
                ),
                rows,
            )
            for at in range(chunks)
        ]
    # Experts are moved once for all that pass together, so whole groups of batches do.
    together = rows if costs.model.has_experts else rows / num_batches
    visits = math.ceil(together / max(1, most // length))
    own = together / visits
    return [
        (Visit(prompts=(Prompts(rows=own, end=length),), sampled=own), rows / own),
    ]


def _steps(costs: Costs, rows: float) -> tuple[Visit, float]:
    """A decode step of all batches, half way through."""
    num_batches = math.ceil(rows / costs.policy.batch_size)
    decoded = costs.job.mean_new / 2
    step = Steps(rows=rows / num_batches, columns=costs.job.mean_prompt + decoded, decoded=decoded)
    if costs.model.has_experts:
        return Visit(steps=(step,) * num_batches, sampled=rows), 1
    return Visit(steps=(step,), sampled=step.rows), num_batches


# ---- rows that come and go


def _paced(costs: Costs, rows: int) -> Iterator[Sweep]:
    """Each sweep takes in some rows and decodes those that came before."""
    job, policy = costs.job, costs.policy
    steps = max(1.0, job.mean_new - 1)
    # A batch decodes when all its rows are prefilled, so one of the slots does not.
    decoded = max(policy.block_size - policy.batch_size, policy.block_size / 2)
    taken = min(policy.sweep_tokens / job.mean_prompt, decoded / steps)
    if job.num_rows is not None:  # there are no parts of sweeps
        taken = rows / math.ceil(rows / taken)
    # A batch is let in row by row, and then takes its steps.
    waits = steps + min(rows, policy.batch_size) / taken
    if job.num_rows is None:  # as many as you like: it goes on like this
        yield _mixed(costs, taken, decoded, rows / taken, waits)
        return
    # The first rows find the slots empty, and the last ones leave them so.
    first = min(rows, decoded)
    filling, full = first / taken, (rows - first) / taken
    last = max(0.0, rows * steps - full * decoded - filling * first / 2) / steps
    for new, old, times, block_times in (
        (taken, first / 2, filling, 0.0 if full else waits - steps),
        (taken, decoded, full, waits if full else 0.0),
        (0.0, last, steps, 0.0 if full else steps),
    ):
        if new + old > 0 and times > 0:
            yield _mixed(costs, new, old, times, block_times)


def _mixed(costs: Costs, new: float, old: float, times: float, block_times: float) -> Sweep:
    """Sweeps with so many rows' prompts and so many rows' steps, in one group or few."""
    job, policy = costs.job, costs.policy
    prompt_tokens = new * job.mean_prompt
    groups = max(1, math.ceil((prompt_tokens + old) / policy.prefill_tokens))
    num_batches = math.ceil(old / policy.batch_size) if old else 0
    decoded = job.mean_new / 2
    step = Steps(rows=old / max(1, num_batches), columns=job.mean_prompt + decoded, decoded=decoded)
    visit = Visit(
        prompts=(Prompts(rows=new / groups, end=job.mean_prompt),) if new else (),
        steps=(step,) * math.ceil(num_batches / groups),
        sampled=(new + old) / groups,
    )
    return Sweep(
        **_of_visits(costs, [(visit, groups)]),
        times=times,
        block_times=block_times,
        prompt_share=prompt_tokens / (old + prompt_tokens),
    )


# ---- a sweep


def _of_visits(costs: Costs, visits: Sequence[tuple[Visit, float]]) -> dict[str, Any]:
    """What a `Sweep` is made of that takes these visits through all layers."""
    sweep = VisitCost()
    commonest = max(costs.distinct_layers, key=lambda pair: pair[1])
    own: dict[str, Any] = {}
    num_visits = max(1, round(sum(number for _, number in visits)))
    visits = [(replace(visit, alone=num_visits == 1), number) for visit, number in visits]
    for layer, count in costs.distinct_layers:
        first = last = costs.visit(layer, visits[0][0])
        sweep.add(first, count)
        for index, (visit, number) in enumerate(visits):
            others = number if index else number - 1
            if others > 0:
                last = costs.visit(layer, visit, first=False)
                sweep.add(last, count * others)
        if layer == commonest[0]:
            own = {"layer": (first, last, num_visits), "layers": count}
    return {"cost": sweep, **own}


def _stalled_s(costs: Costs, sweep: Sweep, room_bytes: float) -> float:
    """What a sweep takes longer because there is no room to fetch ahead as far as would be good.

    With much room the next layer's weights come while this one is computed. With little they come
    when all pages of this layer's visits have come, and its last visit alone is to hide them.
    """
    if sweep.ample_bytes <= room_bytes:
        return 0.0
    first, other, num_visits = sweep.layer
    limited_s, free_s = (
        _layer_s(costs, first, other, num_visits, room) for room in (room_bytes, math.inf)
    )
    return sweep.layers * max(0.0, limited_s - free_s)


def _layer_s(
    costs: Costs, first: VisitCost, other: VisitCost, num_visits: int, room_bytes: float
) -> float:
    """How long a layer takes after others like it, what it needs fetched in order as room is found."""
    weights_bytes = max(0.0, first.staged_bytes - other.staged_bytes)
    fetch_s = [max(costs.lane_s(lane, cost) for lane in LANES[:2]) for cost in (first, other)]
    ends: list[float] = []
    held_bytes = fetched_s = 0.0
    freed = 0
    for visit in range(SETTLED_LAYERS * num_visits):
        is_first = visit % num_visits == 0
        cost = first if is_first else other
        while held_bytes + cost.staged_bytes > room_bytes and freed < visit:
            fetched_s = max(fetched_s, ends[freed])
            freed += 1
            held_bytes -= other.staged_bytes
            held_bytes -= weights_bytes if freed % num_visits == 0 else 0.0
        held_bytes += cost.staged_bytes
        fetched_s += fetch_s[0 if is_first else 1]
        ends.append(max(ends[-1] if ends else 0.0, fetched_s) + cost.compute_s)
    return ends[-1] - ends[-1 - num_visits]

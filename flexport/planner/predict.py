"""How long a job takes under a policy: a closed form, quick enough for a search.

Every sweep over the layers moves some bytes on each lane and computes for some seconds, and all
of this goes on at once; so a sweep takes as long as the busiest of them. The sums come from
`costs`, for a typical visit of each sweep, with all rows as long as the job's mean row. What the
closed form leaves out (how sweeps begin and end, layers that differ) is what the simulator has.

Source: a job's time as the sum over sweeps of the slowest of its lanes is FlexGen's cost model,
arXiv:2303.06865, section 4.3, with its barriers left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexport.planner.costs import LANES, Costs, Prompts, Steps, Visit, VisitCost

__all__ = ["COMPUTE", "HOST_COMPUTE", "Prediction", "predict", "prediction_of"]

COMPUTE = "compute"
HOST_COMPUTE = "host_compute"


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


def predict(costs: Costs) -> Prediction:
    """The prediction for the job and policy that `costs` are of."""
    return _Sum(costs).prediction()


def prediction_of(
    costs: Costs, total: VisitCost, prefill_s: float, decode_s: float, new_tokens: float
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
        machine=costs.machine.name,
    )


@dataclass(slots=True)
class _Sum:
    """Sweeps that are added up."""

    costs: Costs
    prefill_s: float = 0.0
    decode_s: float = 0.0
    new_tokens: float = 0.0
    total: VisitCost = field(default_factory=VisitCost)

    def prediction(self) -> Prediction:
        """Of all sweeps of the job."""
        costs, job, policy = self.costs, self.costs.job, self.costs.policy
        rows = job.num_rows or policy.block_size
        self.new_tokens = rows * job.mean_new
        if policy.sweep_tokens:
            self._paced(rows)
        else:
            full, rest = divmod(rows, policy.block_size)
            self._block(policy.block_size, full)
            self._block(rest, 1)
        return prediction_of(costs, self.total, self.prefill_s, self.decode_s, self.new_tokens)

    # ---- all rows of a block step by step

    def _block(self, rows: int, times: int) -> None:
        """So many blocks of so many rows: one sweep of prompts, and then decode steps."""
        if not rows or not times:
            return
        job = self.costs.job
        self.prefill_s += self._sweep_s(self._prompt_visits(rows), times)
        steps = max(0.0, job.mean_new - 1)
        if steps:
            self.decode_s += self._sweep_s([self._steps(rows)], times * steps)

    def _prompt_visits(self, rows: int) -> list[tuple[Visit, float]]:
        """The visits of a layer that take so many rows' prompts through it, alike ones together."""
        costs, policy = self.costs, self.costs.policy
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

    def _steps(self, rows: float) -> tuple[Visit, float]:
        """A decode step of all batches, half way through."""
        costs = self.costs
        num_batches = math.ceil(rows / costs.policy.batch_size)
        decoded = costs.job.mean_new / 2
        step = Steps(
            rows=rows / num_batches, columns=costs.job.mean_prompt + decoded, decoded=decoded
        )
        if costs.model.has_experts:
            return Visit(steps=(step,) * num_batches, sampled=rows), 1
        return Visit(steps=(step,), sampled=step.rows), num_batches

    # ---- rows that come and go

    def _paced(self, rows: int) -> None:
        """Each sweep takes in some rows and decodes those that came before."""
        job, policy = self.costs.job, self.costs.policy
        steps = max(1.0, job.mean_new - 1)
        # A batch decodes when all its rows are prefilled, so one of the slots does not.
        decoded = max(policy.block_size - policy.batch_size, policy.block_size / 2)
        taken = min(policy.sweep_tokens / job.mean_prompt, decoded / steps)
        # The first rows find the slots empty, and the last ones leave them so.
        first = min(rows, decoded)
        filling, full = first / taken, (rows - first) / taken
        last = max(0.0, rows * steps - full * decoded - filling * first / 2) / steps
        for new, old, times in (
            (taken, first / 2, filling),
            (taken, decoded, full),
            (0.0, last, steps),
        ):
            if new + old > 0 and times > 0:
                self._mixed(new, old, times)

    def _mixed(self, new: float, old: float, times: float) -> None:
        """Sweeps with so many rows' prompts and so many rows' steps, in one group or few."""
        job, policy = self.costs.job, self.costs.policy
        prompt_tokens = new * job.mean_prompt
        groups = max(1, math.ceil((prompt_tokens + old) / policy.prefill_tokens))
        num_batches = math.ceil(old / policy.batch_size) if old else 0
        decoded = job.mean_new / 2
        step = Steps(
            rows=old / max(1, num_batches), columns=job.mean_prompt + decoded, decoded=decoded
        )
        visit = Visit(
            prompts=(Prompts(rows=new / groups, end=job.mean_prompt),) if new else (),
            steps=(step,) * math.ceil(num_batches / groups),
            sampled=(new + old) / groups,
        )
        taken_s = self._sweep_s([(visit, groups)], times)
        share = old / (old + prompt_tokens)
        self.decode_s += share * taken_s
        self.prefill_s += (1 - share) * taken_s

    # ---- a sweep

    def _sweep_s(self, visits: Sequence[tuple[Visit, float]], times: float) -> float:
        """Seconds of so many sweeps that take these visits through all layers."""
        costs = self.costs
        sweep = VisitCost()
        for layer, count in costs.distinct_layers:
            for index, (visit, number) in enumerate(visits):
                if index == 0:
                    sweep.add(costs.visit(layer, visit), count)
                    number -= 1
                if number > 0:
                    sweep.add(costs.visit(layer, visit, first=False), count * number)
        self.total.add(sweep, times)
        return times * costs.sweep_s(sweep)

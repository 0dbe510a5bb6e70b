"""A job without its work: the same visits in the same loop, against a machine's numbers.

The executor's loop asks a `Work` to fetch, to wait, to compute and to write back. This one has no
tensors. It has a clock, and lanes that know how much they still have to do; so it tells how long
a real run takes and what it waits for, with rows of all lengths, layers that differ, sweeps that
begin and end, and as much fetched ahead as the budgets have room for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from flexport.planner.costs import LANES, Costs, Prompts, Steps, VisitCost
from flexport.planner.costs import Visit as Counted
from flexport.planner.predict import Prediction, prediction_of
from flexport.schedule.executor import LAG, execute
from flexport.schedule.order import BatchPlan, Piece, Rota, Visit

__all__ = ["rehearse"]

TOWARDS, HOMEWARDS = LANES[:2], LANES[2:]

MOST_KNOWN = 4096


def rehearse(
    costs: Costs, batches: Iterable[Sequence[tuple[int, int]]], room_bytes: float
) -> Prediction:
    """What a run takes whose micro-batches have rows of (prompt tokens, new tokens).

    `room_bytes` is the memory near the device that what is fetched ahead may take.
    """
    policy = costs.policy
    joins = policy.sweep_tokens > 0 or costs.model.has_experts
    stage = _Stage(costs, batches, room_bytes)
    rota = Rota(
        costs.num_layers,
        policy.sweep_tokens,
        policy.prefill_tokens if joins else 0,
        stage.admit,
        lambda: stage.is_waiting,
    )
    for _ in execute(rota.visits(), stage):
        pass
    return stage.prediction()


@dataclass(slots=True)
class _Lane:
    """Copies one after the other, counted in seconds of the lane's work."""

    asked_s: float = 0.0
    done_s: float = 0.0

    @property
    def left_s(self) -> float:
        """What it still has to do."""
        return self.asked_s - self.done_s

    def go_on(self, seconds: float) -> None:
        """Work for so long, if there is so much."""
        self.done_s = min(self.asked_s, self.done_s + seconds)


@dataclass(slots=True)
class _Batch:
    """A batch under way."""

    plan: BatchPlan
    rows: Sequence[tuple[int, int]]
    columns: int
    """Of its longest prompt."""
    num_steps: int
    """Tokens that its rows sample at most."""
    began_s: float | None = None
    """When its first prompt began."""

    def live(self, piece: Piece) -> int:
        """Rows that a decode step computes: those that may sample one more token."""
        return self.stepping(piece.stop - self.columns)

    def held(self, piece: Piece) -> int:
        """Rows whose pages it moves: those that have ended go when they are more than half."""
        held = len(self.rows)
        for step in range(1, piece.start - self.columns + 1):
            live = self.stepping(step)
            if 2 * live < held:
                held = live
        return held

    def stepping(self, step: int) -> int:
        """Rows that take a decode step; steps are counted from 1."""
        return sum(new > step for _, new in self.rows)


@dataclass(slots=True)
class _Fetched:
    """A visit, and how far each lane must be for it."""

    stage: _Stage
    cost: VisitCost
    until_s: dict[str, float] = field(default_factory=dict)

    def wait(self) -> None:
        """Let the time pass until all is there."""
        lanes = self.stage.lanes
        missing_s = [until - lanes[lane].done_s for lane, until in self.until_s.items()]
        self.stage.pass_by(max(0.0, *missing_s) if missing_s else 0.0)

    join = wait


class _Stage:
    """The work that the loop drives, all but done."""

    def __init__(
        self, costs: Costs, source: Iterable[Sequence[tuple[int, int]]], room_bytes: float
    ) -> None:
        self.lanes = {lane: _Lane() for lane in LANES}
        self.is_waiting = True
        """Whether there are rows that were not let in yet."""
        self._costs = costs
        self._source = iter(source)
        self._room_bytes = room_bytes
        self._held_bytes = 0.0
        self._layer_bytes: dict[tuple[int, int], float] = {}
        """Weights of a layer, held until its last visit of a sweep."""
        self._batches: dict[int, _Batch] = {}
        self._num_batches = self._new_tokens = 0
        self._ahead: deque[tuple[Visit, _Fetched]] = deque()
        self._passed = VisitCost()
        """The visit that was computed last."""
        self._recent: deque[Visit] = deque(maxlen=LAG)
        self._known: dict[tuple[int, tuple[Piece, ...], bool, bool], VisitCost] = {}
        self._total = VisitCost()
        self._prefill_s = self._decode_s = self._lap_s = 0.0
        self._now_s = self._block_s = 0.0

    def admit(self) -> Iterator[BatchPlan]:
        """The plans of batches that can start now."""
        while len(self._batches) < self._costs.policy.num_batches:
            rows = next(self._source, None)
            if rows is None:
                self.is_waiting = False
                return
            lengths = [prompt for prompt, _ in rows]
            steps = max(new for _, new in rows)
            self._new_tokens += sum(new for _, new in rows)
            plan = BatchPlan(self._num_batches, lengths, steps, self._costs.policy.visit_tokens)
            self._batches[self._num_batches] = _Batch(plan, rows, max(lengths), steps)
            self._num_batches += 1
            yield plan

    def prediction(self) -> Prediction:
        """When all visits have passed, and all that they left is at home."""
        self.pass_by(max(lane.left_s for lane in self.lanes.values()))
        return prediction_of(
            self._costs,
            self._total,
            self._prefill_s,
            self._decode_s,
            self._new_tokens,
            self._block_s,
        )

    # ---- what the loop asks

    def has_room_for(self, visit: Visit) -> bool:
        """Whether it can be fetched beside what was fetched ahead, and its pages exist."""
        before = (*(ahead for ahead, _ in self._ahead), *self._recent)
        if any(visit.shares_pages_with(other) for other in before):
            return False
        staged_bytes = self._cost(visit).staged_bytes
        return not staged_bytes or self._held_bytes + staged_bytes <= self._room_bytes

    def fetch(self, visit: Visit) -> None:
        """Give the lanes what the visit needs."""
        cost = self._cost(visit)
        self._held_bytes += cost.staged_bytes
        if visit.first:
            self._layer_bytes[visit.sweep, visit.layer] = cost.layer_bytes
        fetched = _Fetched(self, cost)
        for lane in TOWARDS:
            if lane in cost.moved_bytes:
                self.lanes[lane].asked_s += self._costs.lane_s(lane, cost)
                fetched.until_s[lane] = self.lanes[lane].asked_s
        self._ahead.append((visit, fetched))

    def ready(self, visit: Visit) -> _Fetched:
        """The visit's copies."""
        return self._ahead[0][1]

    def compute(self, visit: Visit) -> None:
        """Let the time pass; as long as the disk is read, it takes more."""
        self._passed = self._ahead.popleft()[1].cost
        self._recent.append(visit)
        for piece in visit.pieces:
            batch = self._batches.get(piece.batch)
            if batch is not None and batch.began_s is None:
                batch.began_s = self._now_s
        machine, disk = self._costs.machine, self.lanes["disk_to_host"]
        left_s = self._passed.compute_s
        both_s = min(left_s / machine.computing_share, disk.left_s / machine.reading_share)
        self.pass_by(both_s, machine.reading_share)
        self.pass_by(left_s - both_s * machine.computing_share)
        self._total.add(self._passed)
        if visit.layer == self._costs.num_layers - 1:
            self._end_rows(visit)

    def write_back(self, visit: Visit) -> None:
        """Give the lanes what the visit left, and give its memory back."""
        cost = self._passed
        for lane in HOMEWARDS:
            self.lanes[lane].asked_s += self._costs.lane_s(lane, cost)
        self._held_bytes -= cost.staged_bytes - cost.layer_bytes
        if visit.last:
            self._held_bytes -= self._layer_bytes.pop((visit.sweep, visit.layer))
        num_tokens = sum(piece.num_tokens for piece in visit.pieces)
        decoded = sum(piece.num_tokens for piece in visit.pieces if piece.rows is None) / num_tokens
        self._decode_s += decoded * self._lap_s
        self._prefill_s += (1 - decoded) * self._lap_s
        self._lap_s = 0.0

    # ---- time

    def pass_by(self, seconds: float, reading_share: float = 1.0) -> None:
        """All lanes go on for so long; the reading of the disk at a share of its rate."""
        self._lap_s += seconds
        self._now_s += seconds
        for name, lane in self.lanes.items():
            lane.go_on(seconds * (reading_share if name == "disk_to_host" else 1.0))

    # ---- inside

    def _end_rows(self, visit: Visit) -> None:
        """The head has sampled: batches whose rows have all they asked for are gone."""
        for piece in visit.pieces:
            batch = self._batches.get(piece.batch)
            if (
                batch is not None
                and piece.stop == batch.columns + batch.num_steps - 1
                and (piece.rows is None or piece.rows[1] == len(batch.rows))
            ):
                batch.plan.ended = True
                self._block_s = max(self._block_s, self._now_s - (batch.began_s or 0.0))
                del self._batches[piece.batch]

    def _cost(self, visit: Visit) -> VisitCost:
        """What the visit comes to; layers of a kind cost the same in one sweep."""
        layer = self._costs.alike[visit.layer]
        key = (layer, visit.pieces, visit.first, visit.last)
        if key not in self._known:
            if len(self._known) > MOST_KNOWN:
                self._known.clear()
            self._known[key] = self._costs.visit(layer, self._counted(visit), first=visit.first)
        return self._known[key]

    def _counted(self, visit: Visit) -> Counted:
        prompts, steps, sampled = [], [], 0.0
        for piece in visit.pieces:
            batch = self._batches.get(piece.batch)
            if batch is None:
                continue
            if piece.rows is None:
                live, held = batch.live(piece), batch.held(piece)
                steps.append(
                    Steps(
                        rows=live,
                        columns=piece.stop,
                        decoded=piece.stop - batch.columns,
                        last=batch.num_steps - 1,
                        held_rows=held,
                        sheds=2 * live < held,
                    )
                )
                sampled += live
                continue
            rows = piece.rows[1] - piece.rows[0]
            length = piece.num_tokens / rows
            first, begin = batch.columns - length, 0.0
            if rows == 1:
                first = batch.columns - batch.rows[piece.rows[0]][0]
                begin = piece.start - first
            prompts.append(
                Prompts(
                    rows=rows,
                    begin=begin,
                    end=begin + length,
                    columns=batch.columns,
                    first=first,
                )
            )
            sampled += rows if piece.stop == batch.columns else 0
        return Counted(
            prompts=tuple(prompts),
            steps=tuple(steps),
            sampled=sampled,
            alone=visit.first and visit.last,
        )

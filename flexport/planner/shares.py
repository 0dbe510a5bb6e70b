"""The nine shares of one block: a linear program.

Of a block whose shape is fixed, the seconds that each lane is busy in a sweep and the bytes on each
tier are sums of a part for the weights, one for the cache and one for the activations, and each is
as good as linear in that kind's shares. So `costs` and `footprint` are asked at a few places only,
the vertices: all of a kind on one tier, and where a share bends (the head is the first to be on the
device). A split is a mixture of vertices, its seconds and bytes are the same mixture of theirs, and a
sweep takes no less than each lane. The job's time is then the least of a linear program.

What is not linear (whole rows, layers fetched ahead, room that is taken once) shows when the
policy's footprint is worked out. By as much as it is off the budgets are corrected, and the program is
solved again; so what comes out fits to the byte, and leaves little.

Source: nine shares by linear programming for each block shape, FlexGen, arXiv:2303.06865, section 4.3.

Dimension key: V vertices of all kinds, S sweeps of a kind, L lanes, P peaks of memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from flexport.planner.costs import LANES, VisitCost
from flexport.planner.footprint import Footprint, ModelSizes
from flexport.planner.predict import predict, sweeps
from flexport.planner.refusal import within
from flexport.planner.task import Planned, Task
from flexport.policy import Budgets, Policy, Split

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Numbers = NDArray[np.float64]

__all__ = ["best_shares", "smallest"]

KINDS = ("weights", "cache", "activations")

ROUNDS = 5
"""Programs that are solved for one block at most; nearly always the second one's policy fits."""

RESERVE = 1e-5
"""Of a budget, what the solver's tolerance and whole grains of memory may take."""

CLOSE = 1e-3
"""Of a budget, what may be left of it where the program thought it full."""

EASE = 1e-4
"""What a second of any lane counts for beside a second of the job: what moves for nothing may be in
the way of something that the sums don't know of."""

WAITS = 0.01
"""Of a run, how much of it may be waiting for room before memory is left free for more."""

SPARED = (0.3, 1.0)
"""Of the room that is missing until nothing waits for it, what is tried."""

LEAST = 1e-6
"""The least share that there is: less is but the solver's tolerance."""

STEPS = 14
"""Halvings in a search for a share: exact to 1/16384, far below one row."""

DEVICE, HOST, DISK = Split(), Split(device=0.0, host=1.0), Split(device=0.0, disk=1.0)


def best_shares(block: Policy, task: Task) -> Planned | None:
    """The fastest policy of a block's shape that fits, or None if there is none.

    The splits of `block` don't matter, but for those that `task.choice` has fixed.
    """
    at_hand = _with(block, {kind: _places(task, kind)[0] for kind in KINDS})
    if task.fits(at_hand):
        return task.planned(at_hand)  # nothing moves, and what is loaded serves the next job, too
    if not any(map(task.fits, smallest(block, task))):
        return None
    program = _Program(block, task)
    best = _solved(program, task, 0.0)
    if best is None:
        return _filled(filter(task.fits, smallest(block, task)), task)
    # Memory that is left free is room to fetch ahead, where a layer's visits wait for it.
    waits_s = best.predicted.run_s - predict(task.costs(best.policy)).run_s
    if waits_s > WAITS * best.predicted.run_s:
        ample_bytes = max(sweep.ample_bytes for sweep in sweeps(task.costs(best.policy)))
        missing_bytes = max(0.0, ample_bytes - task.room_bytes(best.policy))
        for share in SPARED:
            spared = _solved(program, task, share * missing_bytes)
            best = best if spared is None else _better(best, spared)
    return best


def _solved(program: _Program, task: Task, spared_bytes: float) -> Planned | None:
    """The best policy that the program finds, with so much of the device's memory left free."""
    best: Planned | None = None
    correction_P: Numbers | None = None
    for _ in range(ROUNDS):
        solved = program.solve(correction_P, spared_bytes)
        if solved is None:
            break
        policy, expected_P = solved
        needs = task.needs(policy)
        if within_budgets := within(needs, task.budgets):
            best = _better(best, task.planned(policy, needs))
        wrong_P = program.peaks(needs) - expected_P
        if within_budgets and program.is_close(wrong_P, correction_P):
            break
        # Without a tier, what is taken once for it goes, too, and the next program wants it back: so
        # of a policy that does not fit, what was known before is kept.
        if correction_P is not None and not within_budgets:
            wrong_P = program.at_least(wrong_P, correction_P)
        correction_P = wrong_P
    return best


def smallest(block: Policy, task: Task) -> Iterator[Policy]:
    """The policies of a block's shape that may take least.

    A short row's cache is smaller than its way to disk, and so are a few tokens' states.
    """
    for activations in _places(task, "activations"):
        for cache in _places(task, "cache"):
            yield replace(
                block,
                weights=task.choice.weights or DISK,
                cache=cache,
                activations=activations,
            )


def _places(task: Task, kind: str) -> tuple[Split, ...]:
    """All of a kind on one tier; or what is fixed."""
    fixed = getattr(task.choice, kind)
    if fixed is not None:
        return (fixed,)
    # Where memory is unified, nothing is homed on the host: it would take the same bytes there.
    return (DEVICE, DISK) if task.machine.unified else (DEVICE, HOST, DISK)


def _vertices(block: Policy, task: Task, kind: str) -> tuple[Split, ...]:
    """Splits of a kind of which all others are mixtures."""
    places = _places(task, kind)
    if kind != "weights" or task.choice.weights is not None:
        return places
    model: ModelSizes = task.models[block.compress_weights][0]
    bends = []
    head = model.layer_bytes[-1] / model.weight_bytes
    for away in places[1:]:
        bends.append(_mixed([(head, DEVICE), (1 - head, away)]))
    if block.cpu_projections:
        # Of a layer, these matrices are the first to be at home on the host, and stay there.
        share = min(1.0, model.projection_bytes / model.weight_bytes)
        bends.append(_mixed([(share, HOST), (1 - share, DISK)]))
    return (*places, *bends)


def _mixed(parts: Sequence[tuple[float, Split]]) -> Split:
    """A mixture of splits; shares that are nothing but the solver's tolerance are none."""
    sums = [sum(share * split.shares()[at] for share, split in parts) for at in range(3)]
    device, host, disk = (share if share >= LEAST / 2 else 0.0 for share in sums)
    total = device + host + disk
    return Split(device=device / total, host=host / total, disk=disk / total)


def _better(first: Planned | None, second: Planned) -> Planned:
    return second if first is None or second.tok_s > first.tok_s else first


@dataclass(frozen=True, slots=True)
class _Point:
    """What a policy comes to, as far as it is linear."""

    lanes_SL: Numbers
    """Seconds a sweep: of each of LANES, of computing alone, and of that with the CPU's attention
    in place of the device's."""
    load_s: float
    peaks_P: Numbers

    def minus(self, other: _Point) -> _Point:
        return _Point(
            self.lanes_SL - other.lanes_SL, self.load_s - other.load_s, self.peaks_P - other.peaks_P
        )


class _Program:
    """The linear program of one block's shape."""

    def __init__(self, block: Policy, task: Task) -> None:
        import numpy as np

        self._np = np
        self._block, self._task = block, task
        vertices = {kind: _vertices(block, task, kind) for kind in KINDS}
        start = _with(block, {kind: listed[0] for kind, listed in vertices.items()})
        kinds = sweeps(task.costs(start))
        self._times_S = np.array([sweep.times for sweep in kinds])
        self._base = self._point(start)
        self._parts: list[tuple[str, Split]] = []
        """Vertices of all kinds, one after the other."""
        self._deltas: list[_Point] = []
        """What each adds to `_base`."""
        zero = self._base.minus(self._base)
        for kind, listed in vertices.items():
            own = [zero, *(
                self._point(_with(start, {kind: split})).minus(self._base)
                for split in listed[1:]
            )]  # fmt: skip
            if kind == "cache" and block.cpu_attention:
                self._divide_attention(listed, own)
            self._parts += [(kind, split) for split in listed]
            self._deltas += own
        self._budgets_P = _budgets(np, task.budgets, task.machine.unified)
        self._unit_s = max(1e-12, float(self._base.lanes_SL.max()))
        self._rows_and_limits = self._lane_rows()
        # Of two mixtures that take as long, the one that moves and computes less.
        self._seconds_V = np.array(
            [
                EASE * float(self._times_S @ delta.lanes_SL.sum(axis=1))
                + task.counts_load * delta.load_s
                for delta in self._deltas
            ]
        )
        self._seconds_V /= self._unit_s

    # ---- what is solved

    def solve(
        self, correction_P: Numbers | None, spared_bytes: float
    ) -> tuple[Policy, Numbers] | None:
        """The best policy, if peaks are so much more than what is linear says; and these.

        So many bytes of the device's stay free.
        """
        # `linprog` for the same solver, HiGHS, looks so long at what it is given that it takes twice
        # the time.
        from scipy.optimize import LinearConstraint, milp

        np = self._np
        num_sweeps, num_vertices = len(self._times_S), len(self._parts)
        bytes_PV = np.stack([delta.peaks_P for delta in self._deltas], axis=1)
        room_P = self._budgets_P * (1 - RESERVE) - self._base.peaks_P
        room_P[:2] -= spared_bytes
        if correction_P is not None:
            room_P = room_P - correction_P
        scale_P = np.maximum(1.0, np.maximum(np.abs(bytes_PV).max(axis=1), self._budgets_P))
        memory = np.concatenate([bytes_PV, np.zeros((len(room_P), num_sweeps))], axis=1)
        rows, limits = self._rows_and_limits
        sums = np.zeros((len(KINDS), num_vertices + num_sweeps))
        for at, (kind, _) in enumerate(self._parts):
            sums[KINDS.index(kind), at] = 1.0
        upper = np.concatenate([limits, room_P / scale_P, np.ones(len(KINDS))])
        lower = np.full(len(upper), -np.inf)
        lower[-len(KINDS) :] = 1.0
        found: Any = milp(
            np.concatenate([self._seconds_V, self._times_S]) / self._times_S.sum(),
            constraints=LinearConstraint(
                np.concatenate([rows, memory / scale_P[:, None], sums]), lower, upper
            ),
        )
        if found.x is None:
            return None
        mixture_V = found.x[:num_vertices]
        splits = {
            kind: _mixed(
                [
                    (float(share), split)
                    for share, (of, split) in zip(mixture_V, self._parts, strict=True)
                    if of == kind
                ]
            )
            for kind in KINDS
        }
        return _with(self._block, splits), self._base.peaks_P + bytes_PV @ mixture_V

    def peaks(self, needs: Footprint) -> Numbers:
        """What it takes of memory at its peaks, and of the disk."""
        device, host = needs.peaks
        return self._np.array([*device, *host, needs.disk_bytes], dtype=float)

    def at_least(self, wrong_P: Numbers, correction_P: Numbers) -> Numbers:
        """The larger of two corrections of each peak."""
        return self._np.maximum(wrong_P, correction_P)

    def is_close(self, wrong_P: Numbers, correction_P: Numbers | None) -> bool:
        """Whether the program knew what there was to know."""
        known_P = 0.0 if correction_P is None else correction_P
        missed_P = self._np.abs(wrong_P - known_P)
        return bool((missed_P <= CLOSE * self._np.maximum(self._budgets_P, 1.0)).all())

    # ---- its coefficients

    def _point(self, policy: Policy) -> _Point:
        np, costs = self._np, self._task.costs(policy)

        def lanes(cost: VisitCost) -> list[float]:
            busy = [costs.lane_s(lane, cost) for lane in LANES]
            return [*busy, cost.compute_s - cost.waiting_s, cost.compute_s]

        return _Point(
            lanes_SL=np.array([lanes(sweep.cost) for sweep in sweeps(costs)]),
            load_s=costs.load_s,
            peaks_P=self._peaks_beside(policy),
        )

    def _peaks_beside(self, policy: Policy) -> Numbers:
        """The peaks of a vertex; of memory, as they are if some of the cache is on disk.

        Pages are narrower then and take less on their way, for the first row on disk as for the
        last. A vertex that had wide ones would make rows on disk seem to spare memory.
        """
        cache = policy.cache
        if self._task.choice.cache is not None or cache.disk:
            return self.peaks(self._task.needs(policy))
        some = _mixed([(1 - LEAST, cache), (LEAST, DISK)])
        needs = self._task.needs(replace(policy, cache=some))
        return self.peaks(replace(needs, cache_bytes=(*needs.cache_bytes[:2], 0)))

    def _divide_attention(self, listed: Sequence[Split], own: list[_Point]) -> None:
        """Where the device has all the cache, it is not the CPU that has much to do."""
        away = [at for at, split in enumerate(listed) if split.device == 0]
        if not away or listed[0].device < 1:
            return
        lanes_SL = own[0].lanes_SL.copy()
        lanes_SL[:, -1] = own[away[0]].lanes_SL[:, -2]
        # Of its own part the device has nothing left to attend to there.
        lanes_SL[:, -1] += self._base.lanes_SL[:, -2] - self._base.lanes_SL[:, -1]
        own[0] = replace(own[0], lanes_SL=lanes_SL)

    def _lane_rows(self) -> tuple[Numbers, Numbers]:
        """Each sweep's time is no less than each lane's; its unit is a sweep with all at hand.

        Computing and the reading of the disk slow each other down: see `Costs.sweep_s`, of
        whose two cases the larger one is the right one.
        """
        np, machine = self._np, self._task.machine
        num_sweeps, num_vertices = len(self._times_S), len(self._parts)
        deltas_VSL = np.stack([delta.lanes_SL for delta in self._deltas]) / self._unit_s
        base_SL = self._base.lanes_SL / self._unit_s
        computing, reading = machine.computing_share, machine.reading_share
        # Of each bound, how much of each lane is in it.
        bounds = [np.eye(6)[lane] for lane in (1, 2, 3)]
        for compute in (4, 5) if self._block.cpu_attention else (5,):
            disk_first, compute_first = np.eye(6)[0].copy(), np.eye(6)[compute].copy()
            disk_first[compute] = (1 - reading) / computing
            compute_first[0] = (1 - computing) / reading
            bounds += [disk_first, compute_first]
        rows, limits = [], []
        for sweep in range(num_sweeps):
            for bound_L in bounds:
                row = np.zeros(num_vertices + num_sweeps)
                row[:num_vertices] = deltas_VSL[:, sweep] @ bound_L
                row[num_vertices + sweep] = -1.0
                rows.append(row)
                limits.append(-float(base_SL[sweep] @ bound_L))
        return np.stack(rows), np.array(limits)


def _budgets(np: Any, budgets: Budgets, unified: bool) -> Numbers:
    """The budget of each peak."""
    device_bytes = budgets.device_bytes + (budgets.host_bytes if unified else 0)
    found: Numbers = np.array(
        [device_bytes] * 2 + [budgets.host_bytes] * 2 + [budgets.disk_bytes], dtype=float
    )
    return found


def _with(policy: Policy, splits: Mapping[str, Split]) -> Policy:
    changed: dict[str, Any] = dict(splits)
    return replace(policy, **changed)


# ---- where the program finds nothing: memory is so tight that it isn't linear at all


def _filled(starts: Iterable[Policy], task: Task) -> Planned | None:
    """The best of what comes of filling memory with one kind after the other."""
    best: Planned | None = None
    for start in starts:
        for order in (("weights", "cache"), ("cache", "weights")):
            policy = start
            for tier in ("device",) if task.machine.unified else ("device", "host"):
                for kind in order:
                    if getattr(task.choice, kind) is None:
                        policy = _raised(policy, kind, tier, task)
            best = _better(best, task.planned(policy))
    return best


def _raised(policy: Policy, kind: str, tier: str, task: Task) -> Policy:
    """The largest share of `kind` on `tier`, taken from its disk share."""
    split: Split = getattr(policy, kind)

    def moved(share: float) -> Policy:
        shares = {"device": split.device, "host": split.host, "disk": split.disk - share}
        shares[tier] += share
        return _with(policy, {kind: Split(**shares)})

    if split.disk == 0 or task.fits(moved(split.disk)):
        return moved(split.disk)
    low, high = 0.0, split.disk
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if task.fits(moved(middle)) else (low, middle)
    return moved(low)

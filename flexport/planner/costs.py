"""What one visit costs on a machine: seconds of computing, bytes on each lane.

A visit takes some tokens through one layer. Its time of computing is a sum of what its kernels
take at the machine's rates, and a fixed cost; what it moves is the share of the layer's weights,
of its rows' cache and of its tokens' states that is at home elsewhere. The simulator asks visit
by visit, the closed form for a typical visit and how many there are of it: the sums are the same.

Dimension key as in `machine`: bytes, seconds, values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from flexport.planner.footprint import (
    JobSizes,
    LayerCaches,
    ModelSizes,
    layer_splits,
    page_tokens_for,
)
from flexport.planner.machine import Computer, Machine
from flexport.planner.moved_pages import StepPages, mean_step_pages, prompt_pages, step_pages
from flexport.planner.work import LayerWork, Matrices, ModelWork
from flexport.policy import Policy, Split

__all__ = ["LANES", "Costs", "Prompts", "Steps", "Visit", "VisitCost"]

LANES = ("disk_to_host", "host_to_device", "device_to_host", "host_to_disk")
"""As the store and the report call them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Columns begin .. end-1 of some rows' prompts."""

    rows: float
    begin: float = 0
    end: float
    columns: float | None = None
    """Of the batch, whose prompts all end in the last of them; None: of the job's mean prompt."""
    first: float = 0
    """Of these, those before the rows' own first one."""

    @property
    def tokens(self) -> float:
        """All of them."""
        return self.rows * (self.end - self.begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A decode step of a batch: one token of each row, which sees so many columns."""

    rows: float
    columns: float
    decoded: float = 0
    """Of these columns, those of decode steps, this one included."""
    last: int | None = None
    """The last step that the batch may take. None: the step is a typical one, of whose pages the
    mean over the job's steps is counted."""
    held_rows: float | None = None
    """Rows whose pages are moved: some that have ended may still lie among them. None: `rows`."""
    sheds: bool = False
    """Whether all pages are written anew afterwards, without the rows that have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What passes a layer together."""

    prompts: tuple[Prompts, ...] = ()
    steps: tuple[Steps, ...] = ()
    sampled: float = 0
    """Rows of which the head computes logits."""
    alone: bool = False
    """Nothing else passes the layer in this sweep, so states are needed again as soon as they go."""

    @property
    def tokens(self) -> float:
        """All tokens."""
        return self.prompt_tokens + self.step_rows

    @property
    def prompt_tokens(self) -> float:
        """Those of prompts."""
        return sum(each.tokens for each in self.prompts)

    @property
    def step_rows(self) -> float:
        """Those of decode steps: one a row."""
        return sum(each.rows for each in self.steps)

    @property
    def pieces(self) -> int:
        """Parts that have an attention of their own."""
        return len(self.prompts) + len(self.steps)


@dataclass(slots=True)
class VisitCost:
    """Seconds and bytes of one visit; costs of several add up."""

    compute_s: float = 0.0
    """On the device, waiting for the CPU beside it included."""
    waiting_s: float = 0.0
    """Of this, the waiting for the CPU's attention."""
    host_s: float = 0.0
    """On the CPU beside it."""
    moved_bytes: dict[str, float] = field(default_factory=dict)
    """By lane."""
    copies: dict[str, float] = field(default_factory=dict)
    staged_bytes: float = 0.0
    """Memory near the device that what was fetched takes until the visit is over."""
    layer_bytes: float = 0.0
    """Of this, the layer's weights, which stay until its last visit is over."""

    def move(self, lane: str, num_bytes: float, copies: float = 1.0) -> None:
        """Count some bytes on a lane."""
        if num_bytes > 0:
            self.moved_bytes[lane] = self.moved_bytes.get(lane, 0.0) + num_bytes
            self.copies[lane] = self.copies.get(lane, 0.0) + copies

    def add(self, other: VisitCost, times: float = 1.0) -> None:
        """Count another visit, or several like it."""
        self.compute_s += times * other.compute_s
        self.waiting_s += times * other.waiting_s
        self.host_s += times * other.host_s
        for lane, num_bytes in other.moved_bytes.items():
            self.move(lane, times * num_bytes, times * other.copies[lane])


UNDER_WAY_BYTES = 5 * (8 << 20)
"""What a disk that streams is at when another read comes: each of the store's readers has a chunk."""


class Costs:
    """The costs of one model, job and policy on one machine."""

    def __init__(
        self,
        model: ModelSizes,
        work: ModelWork,
        job: JobSizes,
        policy: Policy,
        machine: Machine,
        dtype: str,
    ) -> None:
        """`dtype` is what is computed in."""
        self.model = model.kept_in(policy.compress_cache)
        self.work = work
        self.job = job
        self.policy = policy
        self.machine = machine
        self._dtype = dtype
        self._page_tokens = page_tokens_for(policy, machine.page_tokens)

    # ---- one visit

    def visit(self, layer: int, visit: Visit, *, first: bool = True) -> VisitCost:
        """One visit of a layer of the schedule: 0 embeds, the last one is the head.

        `first` of the sweep: the layer's weights come, and are decoded if need be.
        """
        cost = VisitCost()
        kind = self._kind(layer)
        if first:
            self._stream(cost, layer, visit)
        self._states(cost, visit, layer)
        if kind is None:
            if layer:
                self._head(cost, visit, first)
            else:
                cost.compute_s += self.device.visit_s / 4
                # Rows of the table are read when it is known which.
                asked = min(1.0, visit.tokens * self._splits[0].disk)
                row_bytes = visit.tokens * self.model.hidden_token_bytes
                cost.compute_s += asked * self._urgent_s(row_bytes)
            return cost
        caches = self.model.caches[kind.caches]
        self._cache(cost, visit, caches)
        streamed = self._away[layer]
        cost.compute_s += self._launched_s(
            self.device.visit_s + (visit.pieces - 1) * self.device.piece_s,
            self.device.touch_s(visit.prompt_tokens, visit.step_rows, kind.touched_values)
            + self._products_s(kind.dense, visit.tokens, streamed, first)
            + self._experts_s(kind, visit.tokens, streamed, first),
            waits=self._on_host(layer, visit) > 0,
        )
        self._attention(cost, visit, kind, caches)
        self._projections(cost, visit, layer, caches)
        return cost

    @property
    def device(self) -> Computer:
        """What computes."""
        return self.machine.device

    @property
    def num_layers(self) -> int:
        """Layers of the schedule."""
        return len(self.work.order) + 2

    @cached_property
    def distinct_layers(self) -> list[tuple[int, int]]:
        """The first of each kind of layers of the schedule, and how many they are."""
        order = self.work.order
        kinds = [(1 + order.index(kind), order.count(kind)) for kind in sorted(set(order))]
        return [(0, 1), *kinds, (self.num_layers - 1, 1)]

    @cached_property
    def alike(self) -> list[int]:
        """Of each layer of the schedule, the first one that costs the same."""
        order = self.work.order
        return [0, *(1 + order.index(kind) for kind in order), self.num_layers - 1]

    @cached_property
    def load_s(self) -> float:
        """Until the first sweep: what stays in memory is read, and laid out for the kernels."""
        model, split = self.model, self.policy.weights
        stays = 1 - split.disk
        values = sum(kind.num_layers * _values(kind) for kind in self.work.layers) + _of_matrices(
            self.work.head
        )
        near = split.device + (split.host if self.machine.unified else 0.0)
        return (
            self.machine.disk_read.seconds(stays * model.weight_bytes, self.num_layers)
            + near * values / self.device.laid_out_values_per_s
        )

    def lane_s(self, lane: str, cost: VisitCost) -> float:
        """How long a lane is busy with what some visits move."""
        machine = self.machine
        found = {
            "disk_to_host": machine.disk_read,
            "host_to_disk": machine.disk_write,
            "host_to_device": machine.up,
            "device_to_host": machine.down,
        }[lane]
        if found is None or lane not in cost.moved_bytes:
            return 0.0
        return found.seconds(cost.moved_bytes[lane], cost.copies[lane])

    def sweep_s(self, cost: VisitCost) -> float:
        """How long visits take whose copies and computing all go on at once.

        The device and the reading of the disk leave each other a share of their rates.
        """
        machine = self.machine
        disk_s = self.lane_s("disk_to_host", cost)
        both_s = min(cost.compute_s / machine.computing_share, disk_s / machine.reading_share)
        alone_s = max(
            cost.compute_s - both_s * machine.computing_share,
            disk_s - both_s * machine.reading_share,
        )
        return max(both_s + max(0.0, alone_s), *(self.lane_s(lane, cost) for lane in LANES[1:]))

    # ---- what moves

    @cached_property
    def _splits(self) -> list[Split]:
        return layer_splits(self.model.layer_bytes, self.policy.weights)

    @cached_property
    def _away(self) -> list[float]:
        """Of each layer, the share of its weights that streams to the device."""
        unified = self.machine.unified
        return [each.disk + (0.0 if unified else each.host) for each in self._splits]

    def _kind(self, layer: int) -> LayerWork | None:
        if 0 < layer < self.num_layers - 1:
            return self.work.layers[self.work.order[layer - 1]]
        return None

    def _stream(self, cost: VisitCost, layer: int, visit: Visit) -> None:
        """The layer's weights, as far as they are away."""
        split, size = self._splits[layer], float(self.model.layer_bytes[layer])
        if layer == 0:
            size -= self.model.table_bytes
        experts = self.model.expert_bytes[layer]
        if experts:
            size -= experts * math.pow(1 - self.model.experts_picked, visit.tokens)
        if size <= 0:
            return
        kept_bytes = 0.0
        if self._kind(layer) is not None:
            share = self._on_host(layer, visit)
            kept_bytes = share * self.model.projection_bytes / len(self.work.order)
        self._fetched(cost, split.disk * size, max(0.0, split.host * size - kept_bytes))
        cost.layer_bytes = cost.staged_bytes

    def _fetched(
        self, cost: VisitCost, disk_bytes: float, host_bytes: float, copies: float = 1.0
    ) -> None:
        """What comes to the device from disk and from the host."""
        machine = self.machine
        cost.move("disk_to_host", disk_bytes, copies)
        up_bytes = disk_bytes if machine.unified else disk_bytes + host_bytes
        if machine.up is not None:
            cost.move("host_to_device", up_bytes, copies)
        cost.staged_bytes += up_bytes

    def _written(self, cost: VisitCost, disk_bytes: float, host_bytes: float) -> None:
        """What goes home."""
        machine = self.machine
        if machine.down is not None:
            cost.move("device_to_host", disk_bytes if machine.unified else disk_bytes + host_bytes)
        cost.move("host_to_disk", disk_bytes)

    def _states(self, cost: VisitCost, visit: Visit, layer: int) -> None:
        """States come from the layer before and go to the one after."""
        split = self.policy.activations
        num_bytes = visit.tokens * self.model.hidden_token_bytes
        staged_bytes = cost.staged_bytes
        if layer > 0:
            self._fetched(cost, split.disk * num_bytes, split.host * num_bytes)
        cost.staged_bytes = staged_bytes  # they have room of their own
        if layer < self.num_layers - 1:
            self._written(cost, split.disk * num_bytes, split.host * num_bytes)
        if visit.alone and split.disk and layer > 0:
            machine, far_bytes = self.machine, split.disk * num_bytes
            cost.compute_s += machine.disk_write.seconds(far_bytes) + self._urgent_s(far_bytes)

    def _urgent_s(self, num_bytes: float) -> float:
        """Reading what somebody stands still for, beside all that is read ahead of time."""
        streamed_bytes = self.policy.weights.disk * max(self.model.layer_bytes)
        before_bytes = min(UNDER_WAY_BYTES, streamed_bytes)
        return self.machine.disk_read.seconds(num_bytes + before_bytes)

    def _cache(self, cost: VisitCost, visit: Visit, caches: LayerCaches) -> None:
        """Pages come for decode steps and later chunks, and go home when they were written to."""
        split = self.policy.cache
        if split.device == 1 or (self.machine.unified and not split.disk):
            return
        for steps in visit.steps:
            self._stepped(cost, steps, caches)
        for prompts in visit.prompts:
            columns = prompts.columns or max(prompts.end, self.job.mean_prompt)
            begin = round(prompts.first + prompts.begin) if prompts.begin else 0
            end = round(prompts.first + prompts.end)
            moved = prompt_pages(caches, round(columns), begin, end, self._page_tokens)
            fetched_bytes = prompts.rows * moved.fetched_bytes
            written_bytes = prompts.rows * moved.written_bytes
            self._fetched(cost, split.disk * fetched_bytes, split.host * fetched_bytes)
            if self.job.new_tokens > 1 or end < round(columns):  # else nobody will ask for it
                self._written(cost, split.disk * written_bytes, split.host * written_bytes)

    def _stepped(self, cost: VisitCost, steps: Steps, caches: LayerCaches) -> None:
        """What a batch's decode step moves of its pages."""
        split, unified = self.policy.cache, self.machine.unified
        rows = steps.rows if steps.held_rows is None else steps.held_rows
        pages = self._step_pages(steps, caches)
        disk_bytes, host_bytes = (
            rows * share * pages.complete_bytes for share in (split.disk, split.host)
        )
        left_bytes, resting_bytes = rows * pages.grown_bytes, rows * pages.completed_bytes
        if steps.sheds:
            left_bytes = steps.rows * (pages.complete_bytes + pages.grown_bytes)
            resting_bytes = steps.rows * (pages.complete_bytes + pages.completed_bytes)
        if self.policy.cpu_attention:
            cost.move("disk_to_host", disk_bytes, pages.num_pages)
        else:
            # The newest page of rows at home on disk waits in host memory.
            far = split.disk + split.host
            host_bytes += rows * far * pages.newest_bytes
            # Of complete pages only the values that a step adds up cross the link. From disk whole
            # grains come, in which there may be one of them of any head.
            spared = (1 - self.policy.attn_sparsity) * caches.values.seen_bytes(1)
            host_bytes -= rows * far * pages.complete_bytes * spared / caches.seen_bytes(1)
            if spared and far and not unified:
                cost.compute_s += self.machine.crossing_s  # the host hears what was chosen
            self._fetched(cost, disk_bytes, host_bytes, pages.num_pages)
            self._written(cost, 0.0, far * left_bytes)
        if unified:
            self._written(cost, split.disk * resting_bytes, 0.0)
        else:
            cost.move("host_to_disk", split.disk * resting_bytes)

    def _step_pages(self, steps: Steps, caches: LayerCaches) -> StepPages:
        """What the pages of one row of a batch's decode step are."""
        if steps.last is None:
            prompt, last = round(self.job.mean_prompt), max(1, round(self.job.mean_new) - 1)
            return mean_step_pages(caches, prompt, last, self._page_tokens)
        prompt, step = round(steps.columns - steps.decoded), round(steps.decoded)
        return step_pages(caches, prompt, step, steps.last, self._page_tokens)

    # ---- what is computed

    def _launched_s(self, launches_s: float, work_s: float, *, waits: bool = False) -> float:
        """Kernels' launches and their work, which goes on meanwhile where it is asynchronous.

        Not if it `waits` for the CPU in between, with nothing in its queue.
        """
        at_once = self.device.asynchronous and not waits
        return max(launches_s, work_s) if at_once else launches_s + work_s

    def _products_s(self, matrices: Matrices, tokens: float, streamed: float, first: bool) -> float:
        """Products of so many tokens with matrices of which the share `streamed` has just come."""
        codec, packed_values = self.work.codec, matrices.packed_values
        total_s = self._product_s(self._dtype, tokens, matrices.plain_values, streamed)
        if tokens <= self.device.direct_rows.get(codec, 0):
            return total_s + self._product_s(codec, tokens, packed_values, streamed)
        if first:
            total_s += self.device.decode_s(codec, packed_values)
        # What was decoded lies as it would in a file, wherever it came from.
        return total_s + self._product_s(self._dtype, tokens, packed_values, 1.0)

    def _product_s(self, form: str, tokens: float, values: float, streamed: float) -> float:
        if values <= 0:
            return 0.0
        device = self.device
        return streamed * device.product_s(form, tokens, values, streamed=True) + (
            1 - streamed
        ) * device.product_s(form, tokens, values, streamed=False)

    def _experts_s(self, kind: LayerWork, tokens: float, streamed: float, first: bool) -> float:
        """Experts share the tokens evenly: each that is picked multiplies its part of them."""
        if kind.expert is None or not tokens:
            return 0.0
        left_out = math.pow(1 - kind.top_k / kind.num_experts, tokens)
        picked = kind.num_experts * (1 - left_out)
        rows = max(1.0, tokens * kind.top_k / picked)
        return picked * self._products_s(kind.expert, rows, streamed, first)

    def _head(self, cost: VisitCost, visit: Visit, first: bool) -> None:
        if not visit.sampled:
            return
        head, device = self.work.head, self.device
        cost.compute_s += self._launched_s(
            device.visit_s / 2, self._products_s(head, visit.sampled, self._away[-1], first)
        )
        cost.compute_s += visit.sampled * self.work.vocab_size / device.sampled_values_per_s

    def _attention(
        self, cost: VisitCost, visit: Visit, kind: LayerWork, caches: LayerCaches
    ) -> None:
        device, host, split = self.device, self.machine.host, self.policy.cache
        codec = self.policy.compress_cache
        far = split.disk + split.host if self.policy.cpu_attention and host is not None else 0.0
        device_s = host_s = 0.0
        for prompts in visit.prompts:
            pairs = kind.seen_pairs(int(prompts.begin), math.ceil(prompts.end))
            device_s += (
                prompts.rows * pairs * kind.score_flops / device.prompt_attention_flops_per_s
            )
            if caches.packed:
                made_bytes = prompts.tokens * caches.token_bytes
                device_s += device.pack_s(codec, made_bytes)
        for steps in visit.steps:
            num_bytes = steps.rows * caches.kept_in("none").seen_bytes(steps.columns)
            for computer, share in ((device, 1 - far), (host, far)):
                if computer is None or not share:
                    continue
                taken_s = computer.cache_read_s(kind.queries, share * num_bytes)
                taken_s += self._step_pages(steps, caches).num_pages * computer.page_s
                if caches.packed:
                    taken_s += computer.unpack_s(codec, share * num_bytes)
                if computer is device:
                    device_s += taken_s
                else:
                    host_s += taken_s
        if far and visit.steps:
            rows = far * visit.step_rows
            # Queries and what is new in the cache go down, results come up.
            crossing, new = self.model.crossing_token_bytes, caches.token_bytes
            cost.move("device_to_host", rows * (crossing + new) / 2)
            cost.move("host_to_device", rows * (crossing - new) / 2)
            host_s += self.machine.crossing_s
        cost.host_s += host_s
        cost.waiting_s += max(0.0, host_s - device_s)
        cost.compute_s += max(device_s, host_s)

    def _on_host(self, layer: int, visit: Visit) -> float:
        """The share of a layer's projections that the CPU multiplies with, where they are at home.

        In sweeps of decode steps only. They are the first of a layer's matrices to be on the host.
        """
        if not self.policy.cpu_projections or self.machine.host is None or visit.prompts:
            return 0.0
        num_bytes = self.model.projection_bytes / len(self.work.order)
        if not num_bytes:  # all of them lie as the CPU does not multiply
            return 0.0
        return min(1.0, self._splits[layer].host * self.model.layer_bytes[layer] / num_bytes)

    def _projections(self, cost: VisitCost, visit: Visit, layer: int, caches: LayerCaches) -> None:
        """Projections that the CPU does in the device's place, which waits for them."""
        host, share = self.machine.host, self._on_host(layer, visit)
        if host is None or not share:
            return
        values = share * self.model.projection_values / len(self.work.order)
        taken_s = host.product_s(self._dtype, visit.tokens, values, streamed=True)
        spared_s = self._product_s(self._dtype, visit.tokens, values, 1.0)
        cost.host_s += taken_s
        cost.compute_s += taken_s - spared_s + self.machine.crossing_s
        # States go down, and the queries, keys and values that were made of them come up.
        made_bytes = (self.model.crossing_token_bytes + caches.token_bytes) / 2
        cost.move("device_to_host", visit.tokens * self.model.hidden_token_bytes)
        cost.move("host_to_device", visit.tokens * share * made_bytes)


def _of_matrices(matrices: Matrices) -> int:
    return matrices.plain_values + matrices.packed_values


def _values(kind: LayerWork) -> int:
    experts = kind.num_experts * _of_matrices(kind.expert) if kind.expert else 0
    return _of_matrices(kind.dense) + experts

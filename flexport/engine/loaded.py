"""A plan in force: the weights in their places, and jobs run on them.

This is what needs torch; what comes before, `engine`, does without.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from flexport.backend import Backend
from flexport.engine.admission import Admission, Area
from flexport.engine.clock import Clock
from flexport.engine.generation import Generation
from flexport.engine.host_compute import HostCompute
from flexport.engine.pages import CacheShape
from flexport.engine.plan import Plan
from flexport.engine.report import report
from flexport.engine.rows import Row
from flexport.engine.scoring import Score, Scoring
from flexport.engine.source import Source
from flexport.engine.weights import ModelWeights, place_weights
from flexport.engine.work import JobWork, Purpose
from flexport.intake.pack import pack
from flexport.records import Completion, Request
from flexport.registry import CPU, open_backend
from flexport.schedule.executor import execute
from flexport.schedule.order import Rota
from flexport.store.lanes import Watch
from flexport.store.store import Store
from flexport.tokenizer import Tokenizer
from flexport.torch_ops import torch_dtype

__all__ = ["Loaded"]


class Loaded:
    """One model's weights where a plan wants them. `close` removes every file."""

    def __init__(
        self,
        source: Source,
        backend: Backend,
        plan: Plan,
        offload_dir: Path,
        seed: int,
        watch: Watch | None = None,
    ) -> None:
        """Reads what is to be resident. `seed` is that of made-up weights."""
        started_s = time.perf_counter()
        self.closed = False
        self._spec = source.spec
        self._plan = plan
        self._work_bytes = 0
        self._backend = backend
        self._cpu: Backend | None = None
        self._watch = watch
        self.store = Store(backend, plan.budgets, offload_dir, watch)
        try:
            files = source.files
            if files is None:
                files = source.make_up(self.store.open_run_directory(), plan.dtype, seed)
            layers = place_weights(
                self._spec,
                files,
                plan.policy.weights,
                projections_on_host=plan.policy.cpu_projections,
            )
            self.weights = ModelWeights(
                self._spec,
                layers,
                self.store,
                torch_dtype(plan.dtype),
                cpu_projections=plan.policy.cpu_projections,
            )
            self.weights.load()
        except BaseException:
            self.close()
            raise
        self._load_s = time.perf_counter() - started_s
        self.report: dict[str, Any] = {}
        """The last job's."""

    def follow(self, plan: Plan) -> None:
        """Go on with another plan that leaves the weights where they are."""
        assert plan.policy.weights == self._plan.policy.weights, (plan, self._plan)
        assert plan.policy.cpu_projections == self._plan.policy.cpu_projections, plan
        self.store.device.unreserve(self._work_bytes)
        self._work_bytes = 0
        self.store.device.reserve(plan.needs.work_bytes)
        self._work_bytes = plan.needs.work_bytes
        self._plan = plan

    def generate(
        self, requests: Iterable[Request], tokenizer: Tokenizer | None, seed: int, peek_rows: int
    ) -> Iterator[Completion]:
        """Completions as rows end. Rows that were looked at together are sorted by length."""
        plan = self._plan
        generation = Generation(tokenizer, self._spec.eos_token_ids, seed)
        window = max(peek_rows, 4 * plan.policy.block_size)
        area = Area.of(plan, self._cache_shape())
        packed = pack(requests, plan.policy.batch_size, window, area.holds)
        batches = ([generation.row(request) for request in requests] for requests in packed)
        with closing(self._run(batches, generation, lambda: generation.num_tokens)) as visits:
            for _ in visits:
                while generation.completions:
                    yield generation.completions.popleft()

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """How likely each continuation is after its context, both given as token ids."""
        scoring = Scoring()
        rows = [scoring.row(index, *pair) for index, pair in enumerate(pairs)]
        rows.sort(key=lambda row: -len(row.prompt_ids))
        size = self._plan.policy.batch_size
        batches = (rows[begin : begin + size] for begin in range(0, len(rows), size))
        for _ in self._run(batches, scoring, lambda: 0):
            pass
        return [score for _, score in sorted(scoring.scores, key=lambda scored: scored[0])]

    def close(self) -> None:
        """Give the weights back, and all that was made on disk. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self.store.close()
            if self._cpu is not None:
                self._cpu.close()
            with suppress(Exception):  # a copy's error is this job's, and was told
                self._backend.sync()

    def _run(
        self, batches: Iterable[Sequence[Row]], purpose: Purpose, num_generated: Callable[[], int]
    ) -> Generator[None, None, None]:
        """Run rows given as micro-batches; yields after each visit."""
        plan, store = self._plan, self.store
        clock = Clock(self._watch)
        host = self._host_compute()
        work = JobWork(
            self.weights,
            store,
            plan.policy.activations,
            purpose,
            clock,
            plan.needs,
            host,
        )
        admission = Admission(plan, self._cache_shape(), store, work, batches, host)
        rota = Rota(
            self._spec.num_schedule_layers,
            plan.policy.sweep_tokens,
            plan.policy.prefill_tokens if plan.policy.sweep_tokens else 0,
            admission.admit,
            lambda: admission.is_waiting,
        )
        started_s = time.perf_counter()
        before = store.lane_counts()
        clock.start()
        try:
            for _ in execute(rota.visits(), work):
                yield
            store.drain()
            if host is not None:
                host.close()
        except GeneratorExit:
            if not self.closed:  # else it was closed before its iterator
                work.abandon()
                store.drain()
            raise
        except BaseException:
            self.close()
            raise
        self.report = report(
            plan=plan,
            store=store,
            clock=clock,
            host_compute_s=host.busy_s if host is not None else 0.0,
            lanes={
                name: (moved - before[name][0], busy_s - before[name][1])
                for name, (moved, busy_s) in store.lane_counts().items()
            },
            load_s=self._load_s,
            total_s=time.perf_counter() - started_s,
            prompt_tokens=admission.prompt_tokens,
            generated_tokens=num_generated(),
        )

    def _host_compute(self) -> HostCompute | None:
        """The CPU beside the device, if the plan in force has work for it."""
        policy = self._plan.policy
        if not (policy.cpu_attention or policy.cpu_projections):
            return None
        if self._cpu is None:
            _, self._cpu = open_backend(CPU)
        return HostCompute(self._cpu, self.store, self._watch)

    def _cache_shape(self) -> CacheShape:
        """The shape of the model's cache under the plan in force."""
        by_feature = self._backend.capabilities.keys_by_feature
        dtype = torch_dtype(self._plan.dtype)
        return CacheShape.of(self._spec, self._plan.page_tokens, by_feature, dtype)

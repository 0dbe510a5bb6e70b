"""The engine: one model on one backend under one policy, for one job after another.

Opening reads configs and headers only. The policy is made when the first job is known, since
what fits depends on how long its rows are; then the resident weights are loaded, and stay.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from flexport.backend import Backend
from flexport.engine.admission import Admission, Area
from flexport.engine.clock import Clock
from flexport.engine.generation import Generation
from flexport.engine.limits import default_budgets, dtype_for
from flexport.engine.pages import CacheShape
from flexport.engine.plan import Plan, model_sizes
from flexport.engine.report import report
from flexport.engine.rows import Row
from flexport.engine.scoring import Score, Scoring
from flexport.engine.source import open_source
from flexport.engine.weights import ModelWeights, place_weights
from flexport.engine.work import JobWork, Purpose
from flexport.errors import DoesNotFit, UsageError
from flexport.intake.pack import pack
from flexport.planner.auto import Choice, check, choose
from flexport.planner.footprint import JobSizes, footprint, page_tokens_for
from flexport.policy import Policy
from flexport.records import Completion, Request
from flexport.registry import open_backend
from flexport.schedule.executor import execute
from flexport.schedule.order import Rota
from flexport.store.store import Store
from flexport.tokenizer import Tokenizer, open_tokenizer
from flexport.torch_ops import torch_dtype

__all__ = ["Engine"]

PEEK_ROWS = 512
"""Rows that are looked at before the policy is made; a longer job is taken to be like them."""


class Engine:
    """Runs jobs. A context manager: closing it removes every file it made."""

    def __init__(
        self,
        *,
        model: str | None = None,
        revision: str | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        backend: str | Backend = "auto",
        dtype: str = "auto",
        policy: Policy | None = None,
        choice: Choice | None = None,
        budgets: tuple[int | None, int | None, int | None] = (None, None, None),
        offload_dir: Path | None = None,
        seed: int = 0,
        on_plan: Callable[[Plan], None] | None = None,
    ) -> None:
        """`backend` is a registered name, or one that is open and stays the caller's to close.

        `policy` is obeyed as it is; without it one is made that keeps to `choice`.

        `budgets` are caps in bytes for device, host and disk; None takes what is free.
        `on_plan` is called with each plan before anything of it is done.
        """
        self._source = open_source(model, revision, load_format)
        self._owns_backend = isinstance(backend, str)
        self.backend_name, self.backend = (
            open_backend(backend)
            if isinstance(backend, str)
            else (backend.capabilities.name, backend)
        )
        self.spec = self._source.spec
        self.dtype, self._dtype_reason = dtype_for(
            dtype, self.backend.capabilities, self._source.file_dtype
        )
        self._offload_dir = offload_dir or Path(tempfile.gettempdir())
        self.budgets = default_budgets(self.backend.capabilities, budgets, self._offload_dir)
        self._policy = policy
        self._choice = choice or Choice()
        self._seed = seed
        self._on_plan = on_plan
        self._store: Store | None = None
        self._weights: ModelWeights | None = None
        self._work_bytes = 0
        self._busy = False
        self._load_s = 0.0
        self.plan: Plan | None = None
        self.report: dict[str, Any] = {}
        self.tokenizer: Tokenizer | None = (
            open_tokenizer(self._source.directory) if self._source.directory else None
        )

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._source.name

    # ---- jobs

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Completions in the order in which rows end; requests are taken as there is room.

        Raises DoesNotFit before anything is computed if the budgets are too small. Closing the
        iterator early ends the job and leaves the engine ready for the next one; an error, which
        may leave copies half done, costs the next job the loading of the weights.
        """
        with self._one_job():
            yield from self._generate(requests)

    def _generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source = iter(requests)
        head = list(islice(source, PEEK_ROWS))
        if not head:
            return
        known = len(head) if len(head) < PEEK_ROWS else None
        job = JobSizes(
            prompt_tokens=max(len(request.token_ids) for request in head),
            new_tokens=max(request.sampling.max_tokens for request in head),
            num_rows=known,
        )
        for request in head:
            self._check_length(len(request.token_ids), request.sampling.max_tokens)
        plan = self._prepare(job)
        generation = Generation(self.tokenizer, self.spec.eos_token_ids, self._seed)
        window = max(PEEK_ROWS, 4 * plan.policy.block_size)
        area = Area.of(plan, self._cache_shape())
        packed = pack(chain(head, source), plan.policy.batch_size, window, area.holds)
        batches = ([generation.row(request) for request in requests] for requests in packed)
        with closing(self._run(batches, generation, lambda: generation.num_tokens)) as visits:
            for _ in visits:
                while generation.completions:
                    yield generation.completions.popleft()

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """How likely each continuation is after its context, both given as token ids."""
        if not pairs:
            return []
        scoring = Scoring()
        rows = [scoring.row(index, *pair) for index, pair in enumerate(pairs)]
        longest = max(len(row.prompt_ids) for row in rows)
        self._check_length(longest, 1)
        rows.sort(key=lambda row: -len(row.prompt_ids))
        with self._one_job():
            plan = self._prepare(JobSizes(prompt_tokens=longest, new_tokens=1, num_rows=len(rows)))
            size = plan.policy.batch_size
            batches = (rows[begin : begin + size] for begin in range(0, len(rows), size))
            for _ in self._run(batches, scoring, lambda: 0):
                pass
        return [score for _, score in sorted(scoring.scores, key=lambda scored: scored[0])]

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        self._unload()
        if self._owns_backend:
            self.backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # ---- one job

    @contextmanager
    def _one_job(self) -> Iterator[None]:
        """While it lasts, no other job can start: both would count on the same memory."""
        if self._busy:
            raise UsageError(
                "another job is under way on this engine; finish or close its iterator first"
            )
        self._busy = True
        try:
            yield
        finally:
            self._busy = False

    def _run(
        self, batches: Iterable[Sequence[Row]], purpose: Purpose, num_generated: Callable[[], int]
    ) -> Generator[None, None, None]:
        """Run rows given as micro-batches; yields after each visit."""
        assert self.plan is not None and self._store is not None and self._weights is not None
        store = self._store
        clock = Clock()
        work = JobWork(
            self._weights,
            store,
            self.plan.policy.activations,
            purpose,
            clock,
            self.plan.needs,
        )
        admission = Admission(self.plan, self._cache_shape(), store, work, batches)
        rota = Rota(
            self.spec.num_schedule_layers,
            self.plan.policy.sweep_tokens,
            self.plan.policy.prefill_tokens if self.plan.policy.sweep_tokens else 0,
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
        except GeneratorExit:
            if self._store is store:  # else the engine was closed before its iterator
                work.abandon()
                store.drain()
            raise
        except BaseException:
            self._unload()
            raise
        self.report = report(
            plan=self.plan,
            store=store,
            clock=clock,
            lanes={
                name: (moved - before[name][0], busy_s - before[name][1])
                for name, (moved, busy_s) in store.lane_counts().items()
            },
            load_s=self._load_s,
            total_s=time.perf_counter() - started_s,
            prompt_tokens=admission.prompt_tokens,
            generated_tokens=num_generated(),
        )

    def _cache_shape(self) -> CacheShape:
        """The shape of the model's cache under the plan in force."""
        assert self.plan is not None
        by_feature = self.backend.capabilities.keys_by_feature
        return CacheShape.of(self.spec, self.plan.page_tokens, by_feature, torch_dtype(self.dtype))

    # ---- plans

    def _check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        # The last token that is sampled is never computed, and needs no position.
        if prompt_tokens + new_tokens - 1 > self.spec.max_positions:
            raise UsageError(
                f"a row of {prompt_tokens} prompt tokens and {new_tokens} new ones is longer than "
                f"the {self.spec.max_positions} positions of {self.model_name}"
            )

    def _prepare(self, job: JobSizes) -> Plan:
        """A plan for the job; loads the weights unless they lie already where it wants them."""
        try:
            plan = self._make_plan(job)
        except DoesNotFit:
            if self._weights is None:
                raise
            # What an earlier job left resident may be what is in the way.
            self._unload()
            plan = self._make_plan(job)
        if self._on_plan is not None and plan != self.plan:
            self._on_plan(plan)
        self.plan = plan
        if self._weights is None:
            started_s = time.perf_counter()
            self._load(plan)
            self._load_s = time.perf_counter() - started_s
        self._set_aside(plan.needs.work_bytes)
        return plan

    def _make_plan(self, job: JobSizes) -> Plan:
        item_bytes = torch_dtype(self.dtype).itemsize
        file_item_bytes = torch_dtype(self._source.file_dtype or self.dtype).itemsize
        sizes = model_sizes(self.spec, file_item_bytes, item_bytes)
        capabilities = self.backend.capabilities
        preferred = capabilities.page_tokens
        choice = self._choice
        if self._weights is not None and self.plan is not None:  # what is loaded stays there
            choice = replace(choice, weights=self.plan.policy.weights)
        policy = self._policy or choose(
            sizes,
            job,
            self.budgets,
            page_tokens=preferred,
            unified=capabilities.unified,
            fixed=choice,
        )
        needs = footprint(sizes, job, policy, preferred, capabilities.unified)
        check(needs, policy, self.budgets)
        return Plan(
            model=self.model_name,
            backend=self.backend_name,
            dtype=self.dtype,
            dtype_reason=self._dtype_reason,
            policy=policy,
            job=job,
            needs=needs,
            budgets=self.budgets,
            page_tokens=page_tokens_for(policy, preferred),
            stream_bytes=round(policy.weights.disk * sizes.stream_bytes),
        )

    def _load(self, plan: Plan) -> None:
        store = Store(self.backend, self.budgets, self._offload_dir)
        try:
            files = self._source.files
            if files is None:
                files = self._source.make_up(store.open_run_directory(), self.dtype, self._seed)
            layers = place_weights(self.spec, files, plan.policy.weights)
            weights = ModelWeights(self.spec, layers, store, torch_dtype(self.dtype))
            weights.load()
        except BaseException:
            store.close()
            raise
        self._store, self._weights = store, weights

    def _unload(self) -> None:
        """Give the weights back, and all that was made on disk."""
        store, self._store, self._weights = self._store, None, None
        self._work_bytes = 0
        if store is not None:
            store.close()

    def _set_aside(self, work_bytes: int) -> None:
        """Count what computing takes as used."""
        assert self._store is not None
        self._store.device.unreserve(self._work_bytes)
        self._work_bytes = 0
        self._store.device.reserve(work_bytes)
        self._work_bytes = work_bytes

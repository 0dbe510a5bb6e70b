"""A plan in force: the weights in their places, and jobs run on them.

This is what needs torch; what comes before, `engine`, does without.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from flexport.backend import Backend
from flexport.checkpoint.packed import PackedCache
from flexport.codecs.compressed import Compressed, compressed
from flexport.engine.admission import Admission, Area
from flexport.engine.clock import Clock
from flexport.engine.generation import Generation
from flexport.engine.host_compute import HostCompute
from flexport.engine.packing import ShowPacking, pack_into, packed_files
from flexport.engine.pages import CacheShape
from flexport.engine.plan import Plan
from flexport.engine.report import report
from flexport.engine.rows import Done, Row
from flexport.engine.scoring import Score, Scoring
from flexport.engine.shards import place_weights
from flexport.engine.source import Source
from flexport.engine.sparse_step import Sparsity
from flexport.engine.weights import ModelWeights
from flexport.engine.work import JobWork, Purpose
from flexport.errors import OutOfMemory
from flexport.intake.pack import pack
from flexport.models.spec import Experts
from flexport.process import keep_heap
from flexport.records import Completion, FileTensor, Request
from flexport.registry import CPU, open_backend
from flexport.schedule.executor import execute
from flexport.schedule.order import Rota
from flexport.store.lanes import Watch
from flexport.store.store import Store
from flexport.tokenizer import Tokenizer
from flexport.torch_ops import is_out_of_memory, torch_dtype
from flexport.torch_ops.attention import forget

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
        show_packing: ShowPacking | None = None,
    ) -> None:
        """Reads what is to be resident. `seed` is that of made-up weights.

        Raises OutOfMemory, for which no smaller block helps: weights come before any row.
        """
        started_s = time.perf_counter()
        keep_heap()
        self.closed = False
        self._spec = source.spec
        self.plan = plan
        """The plan in force."""
        self._work_bytes = 0
        self._backend = backend
        self._cpu: Backend | None = None
        self._watch = watch
        self._show_packing = show_packing
        self._in_use = ExitStack()
        """Packed weights in the cache, which nobody removes meanwhile."""
        self.store = Store(backend, plan.budgets, offload_dir, watch)
        try:
            with _told_as_out_of_memory():
                files = source.files
                if files is None:
                    files = source.make_up(self.store.open_run_directory(), plan.dtype, seed)
                form = compressed(plan.policy.compress_weights)
                if form is not None:
                    files = {**files, **self._packed(source, files, form)}
                layers = place_weights(
                    self._spec,
                    lambda tensor: source.stored(tensor, files, form),
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
        except OutOfMemory as error:
            self.close()
            raise OutOfMemory(
                f"{error}; this was while weights were loaded: a smaller --device-memory, or "
                "--percent, keeps fewer of them in memory"
            ) from error
        except BaseException:
            self.close()
            raise
        self._load_s = time.perf_counter() - started_s
        self.report: dict[str, Any] = {}
        """Of the last job that ended, or ran out of memory."""
        self.held_bytes = (0, 0)
        """What a job that ran out of memory had of device and host: so much there is."""
        self.num_lost = 0
        """Rows that it had begun and gave no result of."""

    def _packed(
        self, source: Source, files: Mapping[str, FileTensor], form: Compressed
    ) -> dict[str, FileTensor]:
        """The files of what flexport packs: kept for the next run, but for made-up weights."""
        with self._show_packing() if self._show_packing else nullcontext() as progress:
            if source.files is None:
                directory = self.store.open_run_directory()
                return pack_into(directory, source, files, form, progress=progress)
            packed = packed_files(source, files, form, PackedCache(), progress=progress)
            return self._in_use.enter_context(packed)

    def follow(self, plan: Plan) -> None:
        """Go on with another plan that leaves the weights where they are."""
        assert plan.policy.weights == self.plan.policy.weights, (plan, self.plan)
        assert plan.policy.cpu_projections == self.plan.policy.cpu_projections, plan
        self.store.device.unreserve(self._work_bytes)
        self._work_bytes = 0
        self.store.device.reserve(plan.needs.work_bytes)
        self._work_bytes = plan.needs.work_bytes
        self.plan = plan

    def generate(
        self, requests: Iterable[Request], tokenizer: Tokenizer | None, seed: int, peek_rows: int
    ) -> Iterator[Completion]:
        """Completions as rows end. Rows that were looked at together are sorted by length."""
        plan, done = self.plan, Done()
        generation = Generation(tokenizer, self._spec.eos_token_ids, seed)
        window = max(peek_rows, 4 * plan.policy.block_size)
        area = Area.of(plan, self._cache_shape())
        packed = pack(requests, plan.policy.batch_size, window, area.holds)
        batches = ([generation.row(request) for request in requests] for requests in packed)
        with closing(self._run(batches, generation, done)) as visits:
            for _ in visits:
                while generation.completions:
                    completion = generation.completions.popleft()
                    done.add(len(completion.request.token_ids), len(completion.token_ids))
                    yield completion

    def score(
        self, pairs: Iterable[tuple[int, Sequence[int], Sequence[int]]], *, through_cache: bool
    ) -> Iterator[tuple[int, Score]]:
        """How likely each continuation is after its context, as rows end.

        Takes (index, context, continuation), the latter two as token ids, and gives (index, score).
        """
        scoring, done = Scoring(through_cache=through_cache), Done()
        rows = [scoring.row(*pair) for pair in pairs]
        rows.sort(key=lambda row: -len(row.prompt_ids))
        size = self.plan.policy.batch_size
        batches = (rows[begin : begin + size] for begin in range(0, len(rows), size))
        with closing(self._run(batches, scoring, done)) as visits:
            for _ in visits:
                while scoring.scores:
                    index, row, score = scoring.scores.popleft()
                    done.add(len(row.prompt_ids), row.max_steps - 1)
                    yield index, score

    def close(self) -> None:
        """Give the weights back, and all that was made on disk. A second call does nothing."""
        if not self.closed:
            self.closed = True
            self.store.close()
            self._in_use.close()
            forget()  # masks that steps left on the device
            if self._cpu is not None:
                self._cpu.close()
            with suppress(Exception):  # a copy's error is this job's, and was told
                self._backend.sync()

    def _run(
        self, batches: Iterable[Sequence[Row]], purpose: Purpose, done: Done
    ) -> Generator[None, None, None]:
        """Run rows given as micro-batches; yields after each visit.

        Whatever ran out of memory, and whatever it called that, is raised as OutOfMemory.
        """
        plan, store = self.plan, self.store
        clock = Clock(self._watch)
        host = self._host_compute()
        share = plan.policy.attn_sparsity
        sparsity = Sparsity(share, store) if share < 1 else None
        work = JobWork(
            self.weights,
            store,
            plan.policy.activations,
            purpose,
            clock,
            plan.needs,
            host,
            sparsity,
        )
        admission = Admission(plan, self._cache_shape(), store, work, batches, host)
        rota = Rota(
            self._spec.num_schedule_layers,
            plan.policy.sweep_tokens,
            plan.policy.prefill_tokens if plan.policy.sweep_tokens or self._has_experts else 0,
            admission.admit,
            lambda: admission.is_waiting,
        )
        started_s = time.perf_counter()
        store.drain()  # a lane counts a copy a little after whoever waits for it hears of it
        before = store.lane_counts()
        clock.start()

        def told() -> dict[str, Any]:
            return report(
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
                done=done,
                sparsity=sparsity,
            )

        try:
            with _told_as_out_of_memory():
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
        except OutOfMemory:
            self.held_bytes = (store.device.held_bytes, store.host.held_bytes)
            self.num_lost = admission.num_rows - done.num_rows
            self.close()
            self.report = told()
            raise
        except BaseException:
            self.close()
            raise
        self.report = told()

    @property
    def _has_experts(self) -> bool:
        """Whether tokens should pass each layer together, so that an expert moves but once."""
        return any(isinstance(layer.mlp, Experts) for layer in self._spec.layers)

    def _host_compute(self) -> HostCompute | None:
        """The CPU beside the device, if the plan in force has work for it."""
        policy = self.plan.policy
        if not (policy.cpu_attention or policy.cpu_projections):
            return None
        if self._cpu is None:
            _, self._cpu = open_backend(CPU)
        return HostCompute(self._cpu, self.store, self._watch)

    def _cache_shape(self) -> CacheShape:
        """The shape of the model's cache under the plan in force."""
        by_feature = self._backend.capabilities.keys_by_feature
        dtype = torch_dtype(self.plan.dtype)
        codec = self.plan.policy.compress_cache
        return CacheShape.of(self._spec, self.plan.page_tokens, by_feature, dtype, codec)


@contextmanager
def _told_as_out_of_memory() -> Iterator[None]:
    """Raise as OutOfMemory what torch and the libraries below it raise when memory runs out.

    So that everybody above this has one kind of error to think of.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(str(error) or "no memory is left") from error

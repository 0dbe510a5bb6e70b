"""The engine: one model on one backend under one policy, for one job after another.

Opening reads configs and headers only. The policy is made when the first job is known, since
what fits depends on how long its rows are; then the resident weights are loaded, and stay. All
until then needs no torch, so that what can't work is refused before torch is imported.
"""

from __future__ import annotations

import gc
import logging
import sys
import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from flexport.backend import Backend, Capabilities, MultipliesPacked
from flexport.codecs.compressed import Compressed
from flexport.engine.advice import warnings
from flexport.engine.attempts import forget, joined, retry
from flexport.engine.comparison import comparison
from flexport.engine.in_flight import InFlight
from flexport.engine.limits import default_budgets
from flexport.engine.machines import machine_here
from flexport.engine.plan import Plan
from flexport.engine.planning import KnownSizes, Planning, job_of
from flexport.engine.source import open_source
from flexport.engine.trace import Trace
from flexport.errors import DoesNotFit, OutOfMemory, UsageError
from flexport.planner.footprint import JobSizes
from flexport.planner.halving import halved, left_over
from flexport.planner.machine import Machine
from flexport.planner.task import Choice
from flexport.policy import Budgets, Policy
from flexport.records import Completion, Request
from flexport.registry import describe_backend, open_backend
from flexport.tokenizer import Tokenizer, open_tokenizer

if TYPE_CHECKING:
    from flexport.engine.loaded import Loaded
    from flexport.engine.packing import ShowPacking
    from flexport.engine.scoring import Score

__all__ = ["Engine"]

PEEK_ROWS = 512
"""Rows that are looked at before the policy is made; a longer job is taken to be like them."""

_log = logging.getLogger(__name__)

Item = TypeVar("Item", bound=Hashable)
Result = TypeVar("Result")


class Engine:
    """Runs jobs. A context manager: closing it removes every file it made."""

    budgets: Budgets
    """Of the next plan: those asked for, less what memory has turned out not to be there."""

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
        trace: Path | None = None,
        show_packing: ShowPacking | None = None,
        machine: Machine | None = None,
    ) -> None:
        """`backend` is a registered name, or one that is open and stays the caller's to close.

        `policy` is obeyed as it is; without it one is made that keeps to `choice`. If memory runs
        out in the middle of a job its block is halved, whoever chose it: that the rows get their
        answers was asked for, too, and says more than the number of them that share a sweep.

        `budgets` are caps in bytes for device, host and disk; None takes what is free.
        `on_plan` is called with each plan before anything of it is done, `show_packing` when weights
        are packed or checked. What every lane does when is written to `trace`, a Chrome trace.
        Plans are made with the numbers of `machine`, or else of a typical one.
        """
        self._source = open_source(model, revision, load_format)
        self._sizes_in: KnownSizes = {}
        self.spec = self._source.spec
        self._asked_dtype = dtype
        self._asked_budgets = budgets
        self._offload_dir = offload_dir or Path(tempfile.gettempdir())
        self._policy = policy
        self._choice = choice or Choice()
        self._seed = seed
        self._asked_machine = machine
        self._on_plan = on_plan
        self._show_packing = show_packing
        self._loaded: Loaded | None = None
        self._busy = False
        self.plan: Plan | None = None
        self.report: dict[str, Any] = {}
        self._owns_backend = isinstance(backend, str)
        if isinstance(backend, str):
            self.backend_name = backend
            facts = describe_backend(backend)
            if facts is not None:
                self._refuse_what_never_fits(facts)
            self.backend_name, self.backend = open_backend(backend)
        else:
            self.backend_name, self.backend = backend.capabilities.name, backend
        self._know(self.backend.capabilities)
        self._asked: tuple[Budgets, Policy | None] = (self.budgets, policy)
        self._trace = None if trace is None else Trace(trace)
        self.tokenizer: Tokenizer | None = (
            open_tokenizer(self._source.directory) if self._source.directory else None
        )

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self._source.name

    @property
    def dtype(self) -> str:
        """What is computed in."""
        return self._planning.dtype

    # ---- jobs

    def generate(
        self, requests: Iterable[Request], *, num_rows: int | None = None
    ) -> Iterator[Completion]:
        """Completions in the order in which rows end; requests are taken as there is room.

        The plan is made when the first PEEK_ROWS are known. `num_rows` is about how many there are
        in all, for requests that have no length; a plan for a job of unknown end is one for a
        single block.

        Raises DoesNotFit before anything is computed if the budgets are too small. Closing the
        iterator early ends the job and leaves the engine ready for the next one; an error, which
        may leave copies half done, costs the next job the loading of the weights.

        Where memory runs out though the plan fits (another process took it, or a kernel's
        workspace), the job goes on with half the block, from the prompts of the rows that have
        no completion yet; the report's `retries` and a warning tell. Raises OutOfMemory when the
        block is one row.
        """
        if isinstance(requests, Sized):
            num_rows = len(requests)
        with self._one_job():
            yield from self._generate(InFlight(requests), num_rows)

    def _generate(self, rows: InFlight[Request], num_rows: int | None) -> Iterator[Completion]:
        head = rows.peek(PEEK_ROWS)
        if not head:
            return
        if len(head) < PEEK_ROWS:
            num_rows = len(head)
        elif num_rows is not None:
            num_rows = max(num_rows, PEEK_ROWS)
        job = job_of(head, num_rows)
        for request in head:
            self._planning.check_length(len(request.token_ids), request.sampling.max_tokens)
        del head, request

        def attempt(loaded: Loaded) -> Iterator[Completion]:
            left = rows.remaining()
            for completion in loaded.generate(left, self.tokenizer, self._seed, PEEK_ROWS):
                rows.done(completion.request)
                yield completion

        yield from self._in_attempts(job, rows, attempt)
        self.report |= self._judged(job)

    def _judged(self, job: JobSizes) -> dict[str, Any]:
        """What the report adds when a job has ended: the prediction beside it, and what follows.

        A job that took several attempts was not run as it was predicted, and has neither.
        """
        report, plan = self.report, self.plan
        assert plan is not None
        num_rows = report["rows"]
        if report["retries"] or not num_rows:
            return {"comparison": None, "warnings": []}
        ended = replace(
            job,
            num_rows=num_rows,
            mean_prompt_tokens=report["tokens"]["prompt"] / num_rows,
            mean_new_tokens=report["tokens"]["generated"] / num_rows,
        )
        compared = {
            "comparison": comparison(
                self._planning.predict(ended, plan.policy, plan.budgets), report
            )
        }
        fixed = self._choice.weights is not None or self._choice.cache is not None
        return compared | {
            "warnings": warnings(
                report | compared,
                numbers=plan.numbers,
                asked=self._policy is not None or fixed,
                packed=bool(self._source.packings),
            )
        }

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        through_cache: bool = False,
    ) -> Iterator[tuple[int, Score]]:
        """How likely each continuation is after its context, both given as token ids.

        Gives (index of the pair, score) in the order in which rows end. A continuation is computed
        together with its context, or through_cache, token by token in decode steps. Closing the
        iterator early, errors, and memory that runs out are as with `generate`.
        """
        with self._one_job():
            yield from self._score(pairs, through_cache)

    def _score(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], through_cache: bool
    ) -> Iterator[tuple[int, Score]]:
        if not pairs:
            return
        # The last token of a continuation is scored and never computed.
        longest = max(len(context) + len(target) - 1 for context, target in pairs)
        self._planning.check_length(longest, 1)
        steps = max(len(target) for _, target in pairs) if through_cache else 1
        prompt_tokens = max(len(context) for context, _ in pairs) if through_cache else longest
        job = JobSizes(prompt_tokens=prompt_tokens, new_tokens=steps, num_rows=len(pairs))
        rows = InFlight(range(len(pairs)))

        def attempt(loaded: Loaded) -> Iterator[tuple[int, Score]]:
            left = ((index, *pairs[index]) for index in rows.remaining())
            for index, score in loaded.score(left, through_cache=through_cache):
                rows.done(index)
                yield index, score

        yield from self._in_attempts(job, rows, attempt)

    def close(self) -> None:
        """Give everything back. A second call does nothing."""
        self._unload()
        if self._owns_backend:
            self.backend.close()
        if self._trace is not None:
            self._trace.close()

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

    def _in_attempts(
        self,
        job: JobSizes,
        rows: InFlight[Item],
        attempt: Callable[[Loaded], Iterator[Result]],
    ) -> Iterator[Result]:
        """What `attempt` gives of all rows, though it may take several of smaller and smaller blocks.

        Each begins with the weights' loading: lanes may have been anywhere when memory ran out,
        and only a store that is closed has no copy under way.
        """
        policy: Policy | None = None
        reports: list[dict[str, Any]] = []
        retries: list[dict[str, Any]] = []
        while True:
            loaded = self._prepare(job, policy)
            try:
                yield from attempt(loaded)
            except OutOfMemory as error:
                if rows.source_error is not None:  # that was not the engine's memory
                    raise rows.source_error from None
                policy = self._halve(loaded, error)
                retries.append(retry(str(error), loaded.plan.policy, policy, loaded.num_lost))
                forget(error)
            else:
                reports.append(loaded.report)
                self.report = joined(reports, retries)
                return
            finally:
                if loaded.closed and self._loaded is loaded:
                    self._loaded = None
            reports.append(loaded.report)
            del loaded
            gc.collect()  # a store and its pools know each other

    def _halve(self, loaded: Loaded, error: OutOfMemory) -> Policy:
        """The policy to go on with, which has budgets that leave some memory to others.

        Later jobs keep to them as well, as far as they can. Raises OutOfMemory if one row is all
        that was in flight.
        """
        plan = loaded.plan
        policy = halved(plan.policy, plan.job)
        if policy is None:
            raise OutOfMemory(
                f"{error}; one row at a time ran out of memory, so no smaller block helps: keep less "
                "of the model in memory (--percent, or a smaller --device-memory), give a visit "
                "fewer --prefill-tokens, or end what else takes the memory"
            ) from error
        _log.warning(
            "out of memory: %s; going on with %d x %d rows in place of %d x %d, %d rows begin again",
            error,
            policy.num_batches,
            policy.batch_size,
            plan.policy.num_batches,
            plan.policy.batch_size,
            loaded.num_lost,
        )
        needs = self._planning.footprint(plan.job, policy)
        self.budgets = left_over(self.budgets, loaded.held_bytes, plan.needs, needs)
        if self._policy is not None:
            self._policy = policy
        return policy

    # ---- plans

    def _know(self, facts: Capabilities) -> None:
        """What follows from what a device says of itself."""
        self.budgets = default_budgets(facts, self._asked_budgets, self._offload_dir)
        machine, numbers = machine_here(facts, self.backend_name, self._offload_dir)
        if self._asked_machine is not None:
            machine, numbers = self._asked_machine, "asked"
        self._planning = Planning(
            self._source,
            facts,
            machine,
            numbers=numbers,
            backend=self.backend_name,
            dtype=self._asked_dtype,
            decodes=self._decodes,
            sizes=self._sizes_in,
        )

    def _refuse_what_never_fits(self, facts: Capabilities) -> None:
        """Raise DoesNotFit, in a fraction of the time that opening the device takes."""
        self._know(facts)
        smallest = JobSizes(prompt_tokens=1, new_tokens=1, num_rows=1)
        try:
            self._planning.need_room(smallest, self.budgets, self._policy, self._choice)
        except DoesNotFit as error:
            raise DoesNotFit(
                f"{error}; this is for a row of one token, others take more"
            ) from error

    def _prepare(self, job: JobSizes, policy: Policy | None = None) -> Loaded:
        """A plan for the job, in force; the weights stay where they are if it wants them there."""
        try:
            plan = self._make_plan(job, policy)
        except DoesNotFit:
            if self._loaded is None and self._asked == (self.budgets, self._policy):
                raise
            # What an earlier job left resident may be what is in the way, or what it left free.
            self._unload()
            self.budgets, self._policy = self._asked
            plan = self._make_plan(job, policy)
        if self._on_plan is not None and plan != self.plan:
            self._on_plan(plan)
        self.plan = plan
        if self._loaded is None:
            from flexport.engine.loaded import Loaded  # and torch, after all that needs none

            self._loaded = Loaded(
                self._source,
                self.backend,
                plan,
                self._offload_dir,
                self._seed,
                self._trace.record if self._trace else None,
                self._show_packing,
            )
        self._loaded.follow(plan)
        return self._loaded

    def _make_plan(self, job: JobSizes, policy: Policy | None = None) -> Plan:
        """The plan of `policy`, or else of the one asked for, or else of the best."""
        choice = self._choice
        if self._loaded is not None and self.plan is not None:  # what is loaded stays there
            loaded = self.plan.policy
            choice = replace(
                choice,
                weights=loaded.weights,
                cpu_projections=loaded.cpu_projections,
                compress_weights=loaded.compress_weights,
            )
        return self._planning.plan(job, self.budgets, policy or self._policy, choice)

    def _decodes(self, form: Compressed) -> bool:
        """Whether weights that are packed so are ever decoded.

        Before the backend is open the answer is no, since it may multiply with them.
        """
        if not hasattr(self, "backend"):
            return False
        if not isinstance(self.backend, MultipliesPacked):
            return True
        from flexport.torch_ops import torch_dtype

        return not self.backend.multiplies(form.matrix_form, torch_dtype(self.dtype), sys.maxsize)

    def _unload(self) -> None:
        """Give the weights back, and all that was made on disk."""
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            loaded.close()

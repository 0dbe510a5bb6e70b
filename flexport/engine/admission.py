"""Which rows start when: batches are let in as slots and memory for their caches come free."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

from flexport.engine.cache import BatchCache
from flexport.engine.host_compute import HostCompute
from flexport.engine.pages import CacheShape
from flexport.engine.plan import Plan
from flexport.engine.rows import Batch, Row
from flexport.engine.work import JobWork
from flexport.errors import DoesNotFit, OutOfMemory
from flexport.records import Request
from flexport.schedule.order import BatchPlan
from flexport.store.place import Dealer
from flexport.store.store import Store

__all__ = ["Admission", "Area"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """The cache that the plan has for a batch."""

    shape: CacheShape
    num_bytes: int

    @classmethod
    def of(cls, plan: Plan, shape: CacheShape) -> Area:
        """The batch that was planned for."""
        job = plan.job
        rows = plan.policy.batch_size
        if job.num_rows is not None:
            rows = min(rows, job.num_rows)
        row_bytes = shape.row_bytes(job.prompt_tokens, job.columns - job.prompt_tokens)
        return cls(shape=shape, num_bytes=rows * row_bytes)

    def holds(self, requests: Sequence[Request]) -> bool:
        """Whether these rows together take no more than what was planned for.

        Rows that come after those looked at may be longer; there are fewer of them in a batch.
        """
        prompt_tokens = max(len(request.token_ids) for request in requests)
        new_tokens = max(request.sampling.max_tokens for request in requests)
        row_bytes = self.shape.row_bytes(prompt_tokens, new_tokens - 1)
        return len(requests) * row_bytes <= self.num_bytes


class Admission:
    """Lets batches in as slots and memory come free."""

    def __init__(
        self,
        plan: Plan,
        shape: CacheShape,
        store: Store,
        work: JobWork,
        batches: Iterable[Sequence[Row]],
        host: HostCompute | None = None,
    ) -> None:
        """`host` is the CPU beside the device, if there is one."""
        self.num_rows = 0
        """Rows that were let in so far."""
        self._policy = plan.policy
        self._shape = shape
        self._host_shape: CacheShape | None = None
        if host is not None and plan.policy.cpu_attention:
            self._host_shape = shape.with_keys(by_feature=host.keys_by_feature)
        self._store = store
        self._work = work
        self._source = iter(batches)
        self._waiting: deque[Sequence[Row]] = deque()
        # One for each kind of layer: what rounding takes from a row is given to one of its size.
        self._dealers = {layer: Dealer(plan.policy.cache) for layer in shape.layers}
        self._num_batches = 0
        self._all_read = False

    @property
    def is_waiting(self) -> bool:
        """Whether there are rows that were not let in yet."""
        return bool(self._waiting) or not self._all_read

    def admit(self) -> Iterator[BatchPlan]:
        """The plans of batches that can start now."""
        while len(self._work.batches) < self._policy.num_batches:
            if not self._waiting:
                self._waiting.extend(islice(self._source, 1))
            if not self._waiting:
                self._all_read = True
                self._work.more_to_come = False
                return
            rows = self._waiting.popleft()
            dealers = deepcopy(self._dealers)
            try:
                batch = self._batch(rows)
            except OutOfMemory as error:
                self._dealers = dealers
                if self._work.batches:
                    self._waiting.appendleft(rows)
                    return
                if len(rows) == 1:
                    raise DoesNotFit(
                        f"a row of {len(rows[0].prompt_ids)} prompt tokens and up to "
                        f"{rows[0].max_steps} new ones does not fit: {error}"
                    ) from error
                middle = len(rows) // 2
                self._waiting.extendleft((rows[middle:], rows[:middle]))
                continue
            self._work.batches[batch.index] = batch
            self._num_batches += 1
            self.num_rows += len(rows)
            yield batch.plan

    def _batch(self, rows: Sequence[Row]) -> Batch:
        lengths = [len(row.prompt_ids) for row in rows]
        max_steps = max(row.max_steps for row in rows)
        columns = max(lengths) + max_steps - 1
        # A prompt that sweeps share out may be cut anywhere.
        chunked = self._policy.sweep_tokens > 0 or max(lengths) > self._policy.visit_tokens
        # Where pages are packed, no chunk attends to what earlier ones left in them.
        is_read = max_steps > 1 or (chunked and self._policy.compress_cache == "none")
        cache = BatchCache(
            self._shape,
            self._store,
            lengths,
            self._dealers,
            columns if is_read else 0,
            self._host_shape,
            keys_alone=self._policy.attn_sparsity < 1,
        )
        return Batch(
            index=self._num_batches,
            rows=rows,
            plan=BatchPlan(self._num_batches, lengths, max_steps, self._policy.visit_tokens),
            cache=cache,
            num_columns=max(lengths),
        )

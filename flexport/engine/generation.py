"""What generation wants of logits: each row's next token, until the row ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from flexport.engine.rows import Row
from flexport.engine.sample import RowSampling, row_seed, sample
from flexport.output.decode import RowDecoder
from flexport.records import Completion, FinishReason, Request
from flexport.tokenizer import Tokenizer

__all__ = ["Generation"]

CONTEXT_TOKENS = 8
"""Prompt tokens shown to the text decoder, so that a leading space is seen as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A row's request and what decides when it ends."""

    request: Request
    decoder: RowDecoder
    end_ids: frozenset[int]
    seed: int


class Generation:
    """Samples, and keeps completions until they are taken from `completions`."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_ids: Sequence[int], run_seed: int
    ) -> None:
        self.completions: deque[Completion] = deque()
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._run_seed = run_seed

    def row(self, request: Request) -> Row:
        """The request as the schedule runs it."""
        params = request.sampling
        eos = frozenset() if params.ignore_eos else self._eos_token_ids
        decoder = RowDecoder(
            self._tokenizer,
            params.stop,
            min_tokens=params.min_tokens,
            context=request.token_ids[-CONTEXT_TOKENS:],
        )
        seed = params.seed
        job = _Job(
            request=request,
            decoder=decoder,
            end_ids=eos | frozenset(params.stop_token_ids),
            seed=row_seed(self._run_seed, request.request_id) if seed is None else seed,
        )
        return Row(
            key=job,
            prompt_ids=request.token_ids,
            logits_from=len(request.token_ids) - 1,
            max_steps=params.max_tokens,
        )

    def take(self, rows: Sequence[tuple[Row, int]], logits_WV: Tensor) -> None:
        """Sample one token for each row."""
        choices = [self._sampling(row) for row, _ in rows]
        token_ids = sample(logits_WV, choices).tolist()
        for (row, _), token_id in zip(rows, token_ids, strict=True):
            self._push(row, token_id)

    def _sampling(self, row: Row) -> RowSampling:
        job = _job(row)
        params = job.request.sampling
        penalised = params.repetition_penalty != 1
        return RowSampling(
            params=params,
            seed=job.seed,
            step=len(row.sampled_ids),
            end_ids=tuple(job.end_ids),
            previous_ids=(*row.prompt_ids, *row.sampled_ids) if penalised else (),
        )

    def _push(self, row: Row, token_id: int) -> None:
        job = _job(row)
        row.sampled_ids.append(token_id)
        stopped = job.decoder.push(token_id)
        reason: FinishReason | None = None
        if stopped or token_id in job.end_ids:
            reason = "stop"
        elif len(row.sampled_ids) == row.max_steps:
            reason = "length"
        if reason is not None:
            row.ended = True
            self.completions.append(
                Completion(
                    request=job.request,
                    token_ids=tuple(row.sampled_ids),
                    text=job.decoder.text if self._tokenizer else "",
                    finish_reason=reason,
                )
            )


def _job(row: Row) -> _Job:
    assert isinstance(row.key, _Job)
    return row.key

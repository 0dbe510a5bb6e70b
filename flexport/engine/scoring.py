"""What scoring wants of logits: the probability of tokens that are given."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexport.engine.rows import Row
from flexport.engine.sample import log_probs

__all__ = ["Score", "Scoring"]


class Score(float):
    """The natural logarithm of a continuation's probability after its context."""

    is_greedy: bool
    """Whether each token of the continuation is the most likely one."""
    token_log_probs: tuple[float, ...]
    """What the score is the sum of."""
    best_token_ids: tuple[int, ...]
    """The most likely token in the place of each token of the continuation."""

    @classmethod
    def of(
        cls, targets: Sequence[int], token_log_probs: Sequence[float], best_ids: Sequence[int]
    ) -> Score:
        """The score of a continuation of these tokens, token by token."""
        score = cls(sum(token_log_probs))
        score.token_log_probs = tuple(token_log_probs)
        score.best_token_ids = tuple(best_ids)
        score.is_greedy = score.best_token_ids == tuple(targets)
        return score


@dataclass(slots=True, eq=False)
class _Job:
    index: int
    targets: tuple[int, ...]
    num_in_prompt: int
    """Targets that are computed in the row's prompt; the others are fed to decode steps."""
    log_probs: list[float] = field(default_factory=list)
    best_ids: list[int] = field(default_factory=list)


class Scoring:
    """Keeps scores until they are taken from `scores`, as (index, row, score)."""

    def __init__(self, *, through_cache: bool) -> None:
        """Continuations are computed with their contexts, or else step by step.

        A prompt attends to its own keys and values as they were computed. Steps attend to what the
        cache has made of them, as generation does.
        """
        self.scores: deque[tuple[int, Row, Score]] = deque()
        self._through_cache = through_cache

    def row(self, index: int, context_ids: Sequence[int], target_ids: Sequence[int]) -> Row:
        """A row that computes its context and all but the last of its targets."""
        assert context_ids, "there is no token to predict the first one from"
        assert target_ids, "there is nothing to score"
        num_in_prompt = 0 if self._through_cache else len(target_ids) - 1
        return Row(
            key=_Job(index, tuple(target_ids), num_in_prompt),
            prompt_ids=(*context_ids, *target_ids[:num_in_prompt]),
            logits_from=len(context_ids) - 1,
            max_steps=len(target_ids) - num_in_prompt,
        )

    def take(self, rows: Sequence[tuple[Row, int]], logits_WV: Tensor) -> None:
        """Look the targets up; a row whose last target was seen has ended.

        The next step of a row that has not is given the target, whatever is the most likely token.
        """
        targets: list[int] = []
        for row, count in rows:
            job = _job(row)
            seen = len(job.log_probs)
            targets.extend(job.targets[seen : seen + count])
            job.log_probs.extend([0.0] * count)
        targets_W = torch.tensor(targets, device=logits_WV.device)
        found = log_probs(logits_WV, targets_W).tolist()
        best = logits_WV.argmax(-1).tolist()
        at = 0
        for row, count in rows:
            job = _job(row)
            job.log_probs[-count:] = found[at : at + count]
            job.best_ids.extend(best[at : at + count])
            at += count
            seen = len(job.log_probs)
            row.sampled_ids[:] = job.targets[job.num_in_prompt : seen]
            if seen == len(job.targets):
                row.ended = True
                score = Score.of(job.targets, job.log_probs, job.best_ids)
                self.scores.append((job.index, row, score))


def _job(row: Row) -> _Job:
    assert isinstance(row.key, _Job)
    return row.key

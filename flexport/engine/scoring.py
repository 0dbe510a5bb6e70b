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

    @classmethod
    def of(cls, token_log_probs: Sequence[float], is_greedy: bool) -> Score:
        """The score of a continuation with these log-probabilities of its tokens."""
        score = cls(sum(token_log_probs))
        score.token_log_probs = tuple(token_log_probs)
        score.is_greedy = is_greedy
        return score


@dataclass(slots=True, eq=False)
class _Job:
    index: int
    targets: tuple[int, ...]
    log_probs: list[float] = field(default_factory=list)
    is_greedy: bool = True


class Scoring:
    """Keeps scores until they are taken from `scores`, as (index, tokens computed, score)."""

    def __init__(self) -> None:
        self.scores: deque[tuple[int, int, Score]] = deque()

    def row(self, index: int, context_ids: Sequence[int], target_ids: Sequence[int]) -> Row:
        """A row that computes its context and all but the last of its targets."""
        assert context_ids, "there is no token to predict the first one from"
        assert target_ids, "there is nothing to score"
        return Row(
            key=_Job(index, tuple(target_ids)),
            prompt_ids=(*context_ids, *target_ids[:-1]),
            logits_from=len(context_ids) - 1,
            max_steps=1,
        )

    def take(self, rows: Sequence[tuple[Row, int]], logits_WV: Tensor) -> None:
        """Look the targets up; a row whose last target was seen has ended."""
        targets: list[int] = []
        for row, count in rows:
            job = _job(row)
            seen = len(job.log_probs)
            targets.extend(job.targets[seen : seen + count])
            job.log_probs.extend([0.0] * count)
        targets_W = torch.tensor(targets, device=logits_WV.device)
        found = log_probs(logits_WV, targets_W).tolist()
        best = (logits_WV.argmax(-1) == targets_W).tolist()
        at = 0
        for row, count in rows:
            job = _job(row)
            job.log_probs[-count:] = found[at : at + count]
            job.is_greedy = job.is_greedy and all(best[at : at + count])
            at += count
            if len(job.log_probs) == len(job.targets):
                row.ended = True
                score = Score.of(job.log_probs, job.is_greedy)
                self.scores.append((job.index, len(row.prompt_ids), score))


def _job(row: Row) -> _Job:
    assert isinstance(row.key, _Job)
    return row.key

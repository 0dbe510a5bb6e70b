"""The next token of each row: penalties, cuts and a draw that knows no neighbours.

A row's sample depends on its own logits, its seed and how many tokens it has so far, and on
nothing else: the draw is one uniform number from a counter-based generator (Philox, key = the
row's seed, counter = the step), turned into a token by the inverse of the cumulative
distribution. So a row gives the same sample in whatever block it lands, resumed or not.

Order and meaning of the steps are those of transformers' `generate`: repetition penalty, the ends
masked until min_tokens, temperature, top-k, top-p, min-p. One deviation: of tokens that tie at
the edge of top-p all are kept, where transformers keeps whichever its sort put first.

Dimension key: R rows, V vocabulary, C candidates in falling order, P tokens a row has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from flexport.errors import RunError
from flexport.records import SamplingParams

__all__ = ["RowSampling", "log_probs", "row_seed", "sample"]

_FIRST_CANDIDATES = 1024
"""Top-p nearly always ends among so few; finding them costs a sixth of sorting 50,000."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSampling:
    """What the choice of one row's next token depends on, its logits aside."""

    params: SamplingParams
    seed: int
    step: int
    """How many tokens the row has generated so far."""
    end_ids: Sequence[int] = ()
    """Tokens that would end the row; they can't be chosen before min_tokens."""
    previous_ids: Sequence[int] = ()
    """Prompt and continuation so far; looked at only if there is a repetition penalty."""


def row_seed(run_seed: int, request_id: str) -> int:
    """A row's seed, the same on every machine: 64 bits of a hash of the run's seed and its id."""
    digest = blake2b(f"{run_seed}:{request_id}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sample(logits_RV: Tensor, rows: Sequence[RowSampling]) -> Tensor:
    """The next token id of each row: int64, shape (R,), in host memory.

    logits_RV is float32 and may be written to. Greedy rows take the most likely token, of ties
    the one with the lowest id. Raises RunError if logits are not finite numbers.
    """
    assert logits_RV.shape[0] == len(rows), (logits_RV.shape, len(rows))
    if not rows:
        return torch.empty(0, dtype=torch.int64)
    for logits_V, row in zip(logits_RV, rows, strict=True):
        _penalise_(logits_V, row)

    best_R1, best_ids_R1 = logits_RV.max(-1, keepdim=True)
    _check(best_R1)
    chosen_R = best_ids_R1[:, 0].cpu()
    for cuts, indices in _by_cuts(rows).items():
        whole = len(indices) == len(rows)
        # Differences from the best can't overflow, however small the temperature is.
        scores_RV = logits_RV.sub_(best_R1) if whole else logits_RV[indices] - best_R1[indices]
        uniform_R = torch.tensor(
            [_uniform(rows[index].seed, rows[index].step) for index in indices],
            dtype=torch.float32,
        )
        drawn_R = _draw(cuts.shares(scores_RV), uniform_R.to(scores_RV.device))
        chosen_R[indices] = drawn_R.cpu()
    return chosen_R


def log_probs(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    """The natural logarithm of each target's probability: float32, shape (T,)."""
    target_logits_T = logits_TV.gather(-1, targets_T[:, None])[:, 0]
    return target_logits_T.float() - logits_TV.float().logsumexp(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cuts:
    """How logits become the shares that are drawn from; rows with the same cuts go together."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    def shares(self, scores_RV: Tensor) -> Tensor:
        """Probabilities after the cuts, up to a factor a row; overwrites the scores."""
        # Below the smallest float32 a temperature would become 0, and 0 / 0 is no number.
        scores_RV.div_(max(self.temperature, torch.finfo(scores_RV.dtype).tiny))
        if 0 < self.top_k < scores_RV.shape[-1]:
            edge_R1 = scores_RV.topk(self.top_k).values[:, -1:]
            scores_RV.masked_fill_(scores_RV < edge_R1, -torch.inf)
        shares_RV = scores_RV.softmax(-1)
        if self.top_p < 1:
            edge_R1 = _nucleus_edge(shares_RV, self.top_p)
            shares_RV.masked_fill_(shares_RV < edge_R1, 0)
        if self.min_p > 0:
            edge_R1 = self.min_p * shares_RV.amax(-1, keepdim=True)
            shares_RV.masked_fill_(shares_RV < edge_R1, 0)
        return shares_RV


def _by_cuts(rows: Sequence[RowSampling]) -> dict[_Cuts, list[int]]:
    """The indices of the rows that draw, under their cuts."""
    groups: dict[_Cuts, list[int]] = {}
    for index, row in enumerate(rows):
        params = row.params
        if params.temperature > 0:
            cuts = _Cuts(
                temperature=params.temperature,
                top_k=params.top_k,
                top_p=params.top_p,
                min_p=params.min_p,
            )
            groups.setdefault(cuts, []).append(index)
    return groups


def _penalise_(logits_V: Tensor, row: RowSampling) -> None:
    """Apply the repetition penalty and mask the ends, in place."""
    penalty = row.params.repetition_penalty
    if penalty != 1 and row.previous_ids:
        ids_P = torch.tensor(list(row.previous_ids), device=logits_V.device)
        seen_P = logits_V[ids_P]
        logits_V[ids_P] = torch.where(seen_P < 0, seen_P * penalty, seen_P / penalty)
    if row.step < row.params.min_tokens and row.end_ids:
        logits_V[torch.tensor(list(row.end_ids), device=logits_V.device)] = -torch.inf


def _check(best_R1: Tensor) -> None:
    num_bad = int((~best_R1.isfinite()).sum())
    if num_bad:
        raise RunError(
            f"the logits of {num_bad} of {len(best_R1)} rows are not finite numbers; if the model "
            "was computed in float16 its activations overflowed: use --dtype bfloat16 or float32. "
            "Otherwise its weights may be damaged"
        )


def _nucleus_edge(shares_RV: Tensor, top_p: float) -> Tensor:
    """The smallest share, a row (R, 1), of the likeliest tokens that together reach top_p."""
    num_tokens = shares_RV.shape[-1]
    num_candidates = min(_FIRST_CANDIDATES, num_tokens)
    while True:
        shares_RC = shares_RV.topk(num_candidates).values
        sums_RC = shares_RC.cumsum(-1)
        if num_candidates == num_tokens or bool((sums_RC[:, -1] >= top_p).all()):
            break
        num_candidates = min(8 * num_candidates, num_tokens)
    # A token is in if those before it do not reach top_p yet; so the first one always is.
    last_in_R1 = (sums_RC < top_p).sum(-1, keepdim=True).clamp_max(num_candidates - 1)
    return shares_RC.gather(-1, last_in_R1)


def _draw(shares_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """The token at which the running sum of shares passes uniform_R of its total."""
    sums_RV = shares_RV.cumsum(-1)
    target_R1 = uniform_R[:, None] * sums_RV[:, -1:]
    drawn_R1 = torch.searchsorted(sums_RV, target_R1, right=True)
    drawn_R1.clamp_(max=shares_RV.shape[-1] - 1)
    # Rounding may carry the target to the total, and a parallel sum may waver in its last bit:
    # both could land on a token that was cut.
    best_R1 = shares_RV.argmax(-1, keepdim=True)
    return torch.where(shares_RV.gather(-1, drawn_R1) > 0, drawn_R1, best_R1)[:, 0]


def _uniform(seed: int, step: int) -> float:
    """A number in [0, 1) of 53 random bits, fixed by (seed, step) on every machine."""
    bits = np.random.Philox(key=seed % (1 << 128), counter=step).random_raw()
    return int(bits >> 11) / (1 << 53)

"""What transformers computes if decode steps add up few values, written without our kernel.

Its own attention is replaced by full attention with a softmax over all columns, in which a step
then passes over the values that were not chosen. The cache is `packed_reference`'s, exact or rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import packed_reference
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "few_values"


def logits_of(
    model: Any, prompt: Sequence[int], ids: Sequence[int], share: float, bits: int = 0
) -> Tensor:
    """Logits before each of the tokens that go on with a prompt, of one row."""

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Of one row: queries (1, H, L, E), keys and values (1, K, M, E)."""
        group = query.shape[1] // key.shape[1]
        scores = query[0] @ key[0].repeat_interleave(group, 0).mT * scaling
        if attention_mask is not None:
            scores = scores + attention_mask[0]
        if s_aux is not None:
            sinks = s_aux.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
            scores = torch.cat([scores, sinks], -1)
        weights = scores.softmax(-1)[:, :, : key.shape[2]]
        if query.shape[2] == 1:  # a prompt of one token has nothing to leave out
            for head in range(key.shape[1]):
                own = weights[head * group : (head + 1) * group, 0]
                own *= chosen(own.sum(0), scores[head * group, 0, : key.shape[2]], share)
        out = weights @ value[0].repeat_interleave(group, 0)
        return out.transpose(0, 1)[None].contiguous(), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        logits_LV: Tensor = packed_reference.logits_of(model, prompt, ids, bits)
        return logits_LV
    finally:
        model.set_attn_implementation(before)


def chosen(weights_M: Tensor, scores_M: Tensor, share: float) -> Tensor:
    """1 for the newest column and the heaviest others that are seen, 0 for the rest."""
    seen = [column for column in range(len(weights_M)) if scores_M[column] > -1e30]
    newest = seen.pop()
    heaviest = sorted(seen, key=lambda column: (-float(weights_M[column]), -column))
    num_kept = max(1, math.ceil(round(share * (len(seen) + 1), 6)))
    kept_M = torch.zeros(len(weights_M))
    kept_M[[newest, *heaviest[: num_kept - 1]]] = 1
    return kept_M

"""Which experts a token passes, and what becomes of it there.

All tokens of a visit are sorted by expert first, so that each expert's matrices are multiplied
once, with the tokens of every row that picked it.

Dimension key: T tokens, D hidden features, N experts, A experts that a token passes, G groups of
experts, R tokens that one expert takes, P pairs of a token and an expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flexport.models.ops import gated_mlp
from flexport.models.spec import Experts
from flexport.models.tensors import expert_slot

__all__ = ["expert_mlps", "picked_experts"]


class _Weights(Protocol):
    def linear(self, x_TD: Tensor, part: str) -> Tensor: ...

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]: ...

    def vector(self, slot: str) -> Tensor: ...

    def matrix(self, part: str) -> Tensor: ...

    def experts(self, picked: Sequence[int]) -> Iterator[int]: ...


def expert_mlps(experts: Experts, weights: _Weights, x_TD: Tensor) -> Tensor:
    """The sum of what the picked experts and the shared one make of each token: (T, D)."""
    picked_TA, shares_TA = picked_experts(experts, weights, x_TD)
    # One line for each pair of token and expert, expert by expert.
    order = picked_TA.flatten().argsort(stable=True)
    counts = torch.bincount(picked_TA.flatten(), minlength=experts.num_experts).tolist()
    tokens = order // experts.top_k
    shares = shares_TA.flatten()[order]
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)

    made_PD = x_TD.new_empty(len(tokens), x_TD.shape[1])
    for expert in weights.experts([e for e, count in enumerate(counts) if count]):
        part = slice(starts[expert], starts[expert + 1])
        x_RD = x_TD.index_select(0, tokens[part])
        y_RD = gated_mlp(experts.mlp, weights, x_RD, "expert_", expert_slot("", expert))
        torch.mul(y_RD, shares[part, None], out=made_PD[part])
    # A token's lines are gathered in a few large steps. To scatter them as they come would take
    # three small ones for each expert, or, adding in place, 500 times as long on a CPU.
    line_TA = order.argsort().view(picked_TA.shape)
    total_TD = made_PD.index_select(0, line_TA[:, 0])
    for line_T in line_TA.T[1:]:
        total_TD += made_PD.index_select(0, line_T)
    if experts.shared is not None:
        y_TD = gated_mlp(experts.shared, weights, x_TD, "shared_")
        if experts.shared_gate:
            y_TD *= torch.sigmoid(weights.linear(x_TD, "shared_router"))
        total_TD += y_TD
    return total_TD


def picked_experts(experts: Experts, weights: _Weights, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """The experts that each token passes, and the share of each, in float32: both (T, A).

    All of it is in float32, the product included: among many experts, logits with the few bits of
    a half-wide dtype are often equal, and which one is picked would be chance. Source: softmax and
    the best of all, arXiv:2101.03961; groups and sigmoids, arXiv:2405.04434 section 2.2 and
    arXiv:2412.19437 section 2.1.2.
    """
    bias_N = weights.vector("router.bias").float() if experts.router_bias else None
    logits_TN = functional.linear(x_TD.float(), weights.matrix("router").float(), bias_N)
    scores_TN = logits_TN.sigmoid() if experts.scores == "sigmoid" else logits_TN.softmax(-1)
    ranks_TN = scores_TN
    if experts.correction != "no":
        ranks_TN = scores_TN + weights.vector("router.correction").float()
    if experts.num_groups > 1:
        ranks_TN = ranks_TN.masked_fill(~_in_best_groups(experts, ranks_TN), -math.inf)
    picked_TA = ranks_TN.topk(experts.top_k, -1, sorted=False).indices
    shares_TA = scores_TN.gather(-1, picked_TA)
    if experts.normalised:
        shares_TA = shares_TA / (shares_TA.sum(-1, keepdim=True) + 1e-20)
    return picked_TA, shares_TA * experts.scale


def _in_best_groups(experts: Experts, ranks_TN: Tensor) -> Tensor:
    ranks_TGN = ranks_TN.view(len(ranks_TN), experts.num_groups, -1)
    of_group_TG = ranks_TGN.topk(experts.group_best, -1).values.sum(-1)
    best = of_group_TG.topk(experts.top_groups, -1, sorted=False).indices
    is_best_TG = torch.zeros_like(of_group_TG, dtype=torch.bool).scatter_(1, best, True)
    return is_best_TG[..., None].expand_as(ranks_TGN).reshape(ranks_TN.shape)

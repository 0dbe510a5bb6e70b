"""Which experts a token passes, against the rule in words, one token and one expert at a time.

Dimension key: T tokens, D hidden features, N experts.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flexport.errors import UnsupportedModel
from flexport.models.experts import picked_experts
from flexport.models.spec import Experts, Mlp

MLP = Mlp(size=4, activation="silu", gated=True)


class RouterWeights:
    """A router's weights, and nothing else."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def matrix(self, part: str) -> Tensor:
        return self._tensors[part]

    def vector(self, slot: str) -> Tensor:
        return self._tensors[slot.removeprefix("router.")]


def rule(experts: Experts, logits: list[float], corrections: list[float]) -> dict[int, float]:
    """The picked experts and their shares."""
    if experts.scores == "sigmoid":
        scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    else:
        scores = [math.exp(logit) / sum(map(math.exp, logits)) for logit in logits]
    ranks = [score + more for score, more in zip(scores, corrections, strict=True)]
    size = experts.num_experts // experts.num_groups
    groups = [range(at, at + size) for at in range(0, experts.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted(ranks[e] for e in group)[-experts.group_best :]))
    allowed = [expert for group in groups[: experts.top_groups] for expert in group]
    picked = sorted(allowed, key=lambda expert: -ranks[expert])[: experts.top_k]
    total = sum(scores[expert] for expert in picked) if experts.normalised else 1.0
    return {expert: experts.scale * scores[expert] / total for expert in picked}


@settings(deadline=None)
@given(
    scores=st.sampled_from(["softmax", "sigmoid"]),
    groups=st.sampled_from([(1, 1), (4, 1), (4, 2), (2, 2)]),
    group_best=st.integers(1, 2),
    normalised=st.booleans(),
    corrected=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_a_token_passes_the_best_experts_of_the_best_groups(
    scores, groups, group_best, normalised, corrected, seed
):
    experts = Experts(
        num_experts=8,
        top_k=2,
        mlp=MLP,
        scores=scores,
        normalised=normalised,
        scale=1.5,
        router_bias=True,
        correction="vector" if corrected else "no",
        num_groups=groups[0],
        top_groups=groups[1],
        group_best=group_best,
    )
    draw = torch.Generator().manual_seed(seed)
    x_TD, router_ND = torch.randn(3, 4, generator=draw), torch.randn(8, 4, generator=draw)
    # Large enough for many a sum to be below 0, where an expert that is not allowed must not win.
    bias_N, correction_N = torch.randn(8, generator=draw), 3 * torch.randn(8, generator=draw) - 2
    weights = RouterWeights(router=router_ND, bias=bias_N, correction=correction_N)

    picked_TA, shares_TA = picked_experts(experts, weights, x_TD)  # type: ignore[arg-type]

    logits_TN = x_TD.double() @ router_ND.double().T + bias_N.double()
    corrections = correction_N.tolist() if corrected else [0.0] * 8
    for token in range(3):
        expected = rule(experts, logits_TN[token].tolist(), corrections)
        found = dict(zip(picked_TA[token].tolist(), shares_TA[token].tolist(), strict=True))
        assert found == pytest.approx(expected, rel=1e-4)


def test_experts_whose_logits_differ_by_less_than_a_half_wide_dtype_tells_are_told_apart():
    experts = Experts(num_experts=3, top_k=1, mlp=MLP)
    x_TD = torch.full((1, 4), 1.0, dtype=torch.bfloat16)
    router_ND = torch.tensor([[64.0, 0, 0, 0], [64.0, 0.125, 0, 0], [64.0, 0, 0, 0]])

    weights = RouterWeights(router=router_ND.bfloat16())
    picked_TA, shares_TA = picked_experts(experts, weights, x_TD)  # type: ignore[arg-type]

    assert picked_TA.tolist() == [[1]]
    assert shares_TA.dtype == torch.float32


@pytest.mark.parametrize(
    "wrong",
    [
        {"top_k": 9},
        {"num_groups": 3},
        {"num_groups": 4, "top_groups": 5},
        {"num_groups": 4, "top_groups": 1, "top_k": 3},
        {"num_groups": 8, "top_groups": 2, "group_best": 2},
    ],
)
def test_experts_that_can_not_be_picked_as_asked_are_refused(wrong):
    with pytest.raises(UnsupportedModel, match="can't be picked"):
        Experts(**{"num_experts": 8, "top_k": 2, "mlp": MLP, **wrong})

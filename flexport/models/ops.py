"""Norms, rotations and MLPs: the parts that a decoder layer is made of.

Dimension key: T tokens, D hidden features, M features of the MLP, H heads, E features of a head,
P pairs of features that turn, F features of whatever a slot gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flexport.models.spec import Activation, ClampedSilu, Mlp, Norm

__all__ = ["apply_norm", "gated_mlp", "rotate_"]


class _Weights(Protocol):
    def linear(self, x_TD: Tensor, part: str) -> Tensor: ...

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]: ...

    def vector(self, slot: str) -> Tensor: ...


def apply_norm(norm: Norm, weights: _Weights, x_TF: Tensor, part: str) -> Tensor:
    """The norm of the last dimension, in float32 inside; weights of several heads are (H, E)."""
    weight_F = weights.vector(f"{part}.weight") if norm.weight else None
    bias_F = weights.vector(f"{part}.bias") if norm.bias else None
    size = (x_TF.shape[-1],)
    of_heads = weight_F is not None and weight_F.dim() > 1
    if norm.kind == "layer" and not of_heads:
        return functional.layer_norm(x_TF, size, weight_F, bias_F, norm.eps)
    assert bias_F is None, norm
    if weight_F is not None and norm.plus_one:
        weight_F = weight_F.float() + 1
    wide_TF = x_TF.float()
    if norm.kind == "layer":
        wide_TF = wide_TF - wide_TF.mean(-1, keepdim=True)
    length_T1 = torch.linalg.vector_norm(wide_TF, dim=-1, keepdim=True)
    factor_T1 = torch.rsqrt(length_T1.square_().div_(size[0]).add_(norm.eps))
    if weight_F is not None and (norm.wide or norm.kind == "layer"):
        return (wide_TF * factor_T1).mul_(weight_F).to(x_TF.dtype)
    # Written in its own dtype at once: a pass over memory less.
    normed_TF = torch.mul(wide_TF, factor_T1, out=torch.empty_like(x_TF))
    return normed_TF if weight_F is None else normed_TF.mul_(weight_F)


def rotate_(x_THE: Tensor, cos_T1P: Tensor, sin_T1P: Tensor, interleaved: bool) -> None:
    """Turn each pair of the first features by its token's angle, in place.

    (a, b) becomes (a cos - b sin, b cos + a sin); source: arXiv:2104.09864, section 3.2.
    """
    num_pairs = cos_T1P.shape[-1]
    turning_THF = x_THE[..., : 2 * num_pairs]
    if interleaved:
        a_THP, b_THP = turning_THF[..., ::2], turning_THF[..., 1::2]
    else:
        a_THP, b_THP = turning_THF[..., :num_pairs], turning_THF[..., num_pairs:]
    new_a_THP = (a_THP * cos_T1P).addcmul_(b_THP, sin_T1P, value=-1)
    b_THP.copy_((b_THP * cos_T1P).addcmul_(a_THP, sin_T1P))
    a_THP.copy_(new_a_THP)


def gated_mlp(
    mlp: Mlp, weights: _Weights, x_TD: Tensor, prefix: str = "", suffix: str = ""
) -> Tensor:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) without a gate: (T, D).

    prefix and suffix say whose parts they are.
    """
    products = weights.linears(x_TD, [f"{prefix}{part}{suffix}" for part in mlp.inputs])
    if not mlp.gated:
        h_TM = _activated_(products[0], mlp.activation)
    else:
        if mlp.fused == "no":
            gate_TM, up_TM = products
        elif mlp.fused == "halves":
            gate_TM, up_TM = products[0].chunk(2, -1)
        else:
            gate_TM, up_TM = products[0][..., ::2], products[0][..., 1::2]
        h_TM = _gated(gate_TM, up_TM, mlp.activation)
    del products
    return weights.linear(h_TM, f"{prefix}down{suffix}")


def _gated(gate_TM: Tensor, up_TM: Tensor, activation: Activation | ClampedSilu) -> Tensor:
    if isinstance(activation, ClampedSilu):
        limit = activation.limit
        gate_TM, up_TM = gate_TM.clamp(max=limit), up_TM.clamp(-limit, limit)
        return (up_TM + 1) * (gate_TM * torch.sigmoid(gate_TM * activation.steepness))
    return _activated_(gate_TM, activation).mul_(up_TM)


def _activated_(x_TM: Tensor, activation: Activation | ClampedSilu) -> Tensor:
    """The activation of x, in x's own memory where torch can."""
    assert not isinstance(activation, ClampedSilu), "clamped, and without a gate"
    if activation == "relu":
        return torch.relu_(x_TM)
    if activation == "relu_squared":
        return torch.relu_(x_TM).square_()
    if activation == "silu":
        return functional.silu(x_TM, inplace=True)
    return functional.gelu(x_TM, approximate="tanh" if activation == "gelu_tanh" else "none")

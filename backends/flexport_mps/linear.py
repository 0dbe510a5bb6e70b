"""Matrix products in the shapes in which Metal's are right.

Products go to torch as one flat matrix by another, both contiguous, within two sizes:

- weights that are not contiguous gave wrong numbers in torch 2.8 (pytorch#161640), and inputs of
  more than two dimensions do in some shapes up to now (pytorch#180776, #189495);
- more than 32768 features out gave wrong numbers for many rows (pytorch#116769, #122045), so wide
  weights are multiplied by row blocks, which costs no copy of them;
- from 32767 features in on, M1 and M2 add what lies behind the operands to the sum
  (pytorch#195163). Such products are cut, and the parts added up in float32; each part is rounded
  to the dtype once, which a whole product would not be. Only OPT-66b and OPT-175b have such
  weights.

Apple does not say what its half-precision products accumulate in; the conformance suite, run on
the device, bounds it.

Dimension key: T tokens, D features in, F features out, P of them in a block.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["MOST_FEATURES_IN", "linear"]

MOST_FEATURES_IN = 32766
MOST_FEATURES_OUT = 32768

CUT_FEATURES_OUT = 1024
"""Rows of a weight that is cut: their part, which has to be copied, takes 64 MiB."""


def linear(x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    """x @ weight.T + bias, (T, F) in x's dtype."""
    num_out, num_in = weight_FD.shape
    if x_TD.shape[0] == 0 or num_out == 0:
        return x_TD.new_empty(x_TD.shape[0], num_out)
    x_TD, weight_FD = x_TD.contiguous(), weight_FD.contiguous()
    multiply = functional.linear if num_in <= MOST_FEATURES_IN else _cut
    most = MOST_FEATURES_OUT if num_in <= MOST_FEATURES_IN else CUT_FEATURES_OUT
    blocks_TP = [
        multiply(x_TD, weight_FD[begin : begin + most], _part(bias_F, begin, most))
        for begin in range(0, num_out, most)
    ]
    return blocks_TP[0] if len(blocks_TP) == 1 else torch.cat(blocks_TP, dim=1)


def _cut(x_TD: Tensor, weight_PD: Tensor, bias_P: Tensor | None) -> Tensor:
    """The same product as a sum over parts of the features in."""
    sum_TP = x_TD.new_zeros(x_TD.shape[0], weight_PD.shape[0], dtype=torch.float32)
    for begin in range(0, x_TD.shape[1], MOST_FEATURES_IN):
        part = slice(begin, begin + MOST_FEATURES_IN)
        sum_TP += functional.linear(x_TD[:, part].contiguous(), weight_PD[:, part].contiguous())
    return (sum_TP if bias_P is None else sum_TP + bias_P).to(x_TD.dtype)


def _part(bias_F: Tensor | None, begin: int, size: int) -> Tensor | None:
    return None if bias_F is None else bias_F[begin : begin + size]

"""The one decoder: embedding, decoder layer and head of every family, on flat tokens.

All rows' new tokens are laid end to end, so there is no padding and a token is a line of x_TD.
What crosses tokens is attention alone, and that is the caller's (`Attend`), who knows the rows
and their caches. What a layer's weights are made of and where they live is the caller's too
(`Weights`); here is only the arithmetic and its order.

Dimension key: T tokens, D hidden features, S features of the token table, M features of the
MLP, H query heads, K key/value heads, E features of a head, F features of whatever a slot
gives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from flexport.models.spec import Activation, ModelSpec

__all__ = ["Attend", "Weights", "decoder_layer", "embed", "head"]

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""attend(q_THE, k_TKE, v_TKE) -> o_THE: store the new keys and values, attend over all.

Queries come unscaled; the caller scales scores by `spec.attention_scale`.
"""


class Weights(Protocol):
    """What a layer asks of its weights. A part is a slot without ".weight" or ".bias"."""

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        """The product x @ weight.T, plus the bias if the part has one.

        A new tensor (T, F) that the decoder may write to.
        """

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        """The products of one x with several parts."""

    def vector(self, slot: str) -> Tensor:
        """A norm's weight or bias, on the device, in the dtype computed in."""

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, in the dtype computed in.

        A new tensor (T, F) that the decoder may write to.
        """


def embed(spec: ModelSpec, weights: Weights, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """Hidden states x_TD of token ids at positions (a row's first token has position 0)."""
    x_TD = weights.rows("tokens", ids_T)
    if spec.projected:
        x_TD = weights.linear(x_TD, "project_in")
    return x_TD.add_(weights.rows("positions", positions_T + spec.position_offset))


def decoder_layer(spec: ModelSpec, weights: Weights, x_TD: Tensor, attend: Attend) -> Tensor:
    """Hidden states after one decoder layer.

    Takes x_TD over: its memory is written to, and may or may not be the result's.
    """
    before = spec.norm_place == "pre"
    num_tokens = x_TD.shape[0]

    h_TD = _norm(spec, weights, x_TD, "attention_norm") if before else x_TD
    q_TF, k_TF, v_TF = weights.linears(h_TD, ("q", "k", "v"))
    q_THE = q_TF.view(num_tokens, spec.num_heads, spec.head_dim)
    k_TKE = k_TF.view(num_tokens, spec.num_kv_heads, spec.head_dim)
    v_TKE = v_TF.view(num_tokens, spec.num_kv_heads, spec.head_dim)
    # From here on the norm's output is garbage; a wide visit has no room for garbage.
    del h_TD
    o_TF = attend(q_THE, k_TKE, v_TKE).reshape(num_tokens, spec.num_heads * spec.head_dim)
    del q_TF, k_TF, v_TF, q_THE, k_TKE, v_TKE
    x_TD.add_(weights.linear(o_TF, "out"))
    del o_TF
    if not before:
        x_TD = _norm(spec, weights, x_TD, "attention_norm")

    h_TD = _norm(spec, weights, x_TD, "mlp_norm") if before else x_TD
    h_TM = weights.linear(h_TD, "up")
    del h_TD
    x_TD.add_(weights.linear(_activate_(h_TM, spec.activation), "down"))
    return x_TD if before else _norm(spec, weights, x_TD, "mlp_norm")


def head(spec: ModelSpec, weights: Weights, x_TD: Tensor) -> Tensor:
    """Logits (T, V) in float32; x_TD is left as it was.

    The product itself is in the dtype computed in, as in transformers; float32 keeps what
    follows (log-softmax, cuts) from losing more.
    """
    x_TS = _norm(spec, weights, x_TD, "final_norm") if spec.final_norm else x_TD
    if spec.projected:
        x_TS = weights.linear(x_TS, "project_out")
    return weights.linear(x_TS, "head").float()


def _norm(spec: ModelSpec, weights: Weights, x_TD: Tensor, part: str) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over features, times a weight plus a bias if it has them."""
    weight_D = weights.vector(f"{part}.weight") if spec.norm_affine else None
    bias_D = weights.vector(f"{part}.bias") if spec.norm_affine else None
    return functional.layer_norm(x_TD, (spec.hidden_size,), weight_D, bias_D, spec.norm_eps)


def _activate_(x_TM: Tensor, activation: Activation) -> Tensor:
    """The activation of x, in x's own memory where torch can."""
    if activation == "relu":
        return torch.relu_(x_TM)
    if activation == "silu":
        return functional.silu(x_TM, inplace=True)
    return functional.gelu(x_TM, approximate="tanh" if activation == "gelu_tanh" else "none")

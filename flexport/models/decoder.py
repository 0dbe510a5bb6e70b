"""The one decoder: embedding, decoder layer and head of every family, on flat tokens.

All rows' new tokens are laid end to end, so there is no padding and a token is a line of x_TD.
What crosses tokens is attention alone, and that is the caller's (`Attend`), who knows the rows
and their caches. What a layer's weights are made of and where they live is the caller's too
(`Weights`); here is only the arithmetic and its order.

Dimension key: T tokens, D hidden features, S features of the token table, M features of the
MLP, H query heads, K key/value heads, E features of a head, L features of a compressed key and
value, P of a query that do not turn, U features of a value, N experts, A experts that a token
passes, F features of whatever a slot gives, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flexport.models.experts import expert_mlps
from flexport.models.ops import apply_norm, gated_mlp, rotate_
from flexport.models.rope import Rope
from flexport.models.spec import (
    Attention,
    Experts,
    Fused,
    HeadNorm,
    LatentAttention,
    Layer,
    ModelSpec,
)

__all__ = ["Attend", "Turns", "Weights", "decoder_layer", "embed", "head"]


class Attend(Protocol):
    """Stores the tokens' new keys and values, and attends over all."""

    def __call__(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor | None, sinks_H: Tensor | None
    ) -> Tensor:
        """The result o_THE. Without values, keys are values, too.

        Queries come unscaled; the caller knows scale, window, cap and slopes of the layer.
        """


Turns = Callable[[Rope], tuple[Tensor, Tensor]]
"""Cosines and sines of the tokens' angles, each (T, 1, pairs), in the dtype computed in."""


class Weights(Protocol):
    """What a layer asks of its weights. A part is a slot without ".weight" or ".bias"."""

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        """The product x @ weight.T, plus the bias if the part has one.

        A new tensor (T, F) that the decoder may write to.
        """

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        """The products of one x with several parts."""

    def vector(self, slot: str) -> Tensor:
        """A vector, or one a head, on the device, in its own shape.

        In the dtype computed in; what is exact (`TensorSpec.exact`), in its file's.
        """

    def matrix(self, part: str) -> Tensor:
        """A whole matrix (F, D) on the device, in the same dtypes."""

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        """Rows of a table, in the dtype computed in.

        A new tensor (T, F) that the decoder may write to.
        """

    def experts(self, picked: Sequence[int]) -> Iterator[int]:
        """The experts of `picked`, each when its parts can be used, until the next one is asked for."""


def embed(spec: ModelSpec, weights: Weights, ids_T: Tensor, positions_T: Tensor) -> Tensor:
    """Hidden states x_TD of token ids at positions (a row's first token has position 0)."""
    x_TD = weights.rows("tokens", ids_T)
    if spec.projected:
        x_TD = weights.linear(x_TD, "project_in")
    if spec.embed_scale != 1.0:
        x_TD *= x_TD.new_tensor(spec.embed_scale)
    if spec.learned_positions:
        x_TD.add_(weights.rows("positions", positions_T + spec.position_offset))
    return apply_norm(spec.norm, weights, x_TD, "embed_norm") if spec.embed_norm else x_TD


def decoder_layer(
    spec: ModelSpec, layer: Layer, weights: Weights, x_TD: Tensor, attend: Attend, turns: Turns
) -> Tensor:
    """Hidden states after one decoder layer.

    Takes x_TD over: its memory is written to, and may or may not be the result's.
    """
    norm, scale = spec.norm, spec.residual_scale
    before, behind = layer.norms in ("input", "both"), layer.norms in ("output", "both")

    def added(x_TD: Tensor, half_TD: Tensor, part: str) -> Tensor:
        if behind:
            half_TD = apply_norm(norm, weights, half_TD, part)
        x_TD.add_(half_TD, alpha=scale)
        return apply_norm(norm, weights, x_TD, part) if layer.norms == "sum" else x_TD

    h_TD = apply_norm(norm, weights, x_TD, "attention_norm") if before else x_TD
    if isinstance(layer.attention, Attention):
        o_TF = _attention(layer.attention, weights, h_TD, attend, turns)
    else:
        o_TF = _latent_attention(layer.attention, weights, h_TD, attend, turns)
    if layer.parallel == "no":
        # From here on the norm's output is garbage; a wide visit has no room for garbage.
        del h_TD
    a_TD = weights.linear(o_TF, "out")
    del o_TF
    if layer.parallel == "no":
        x_TD = added(x_TD, a_TD, "attention_out_norm")
        del a_TD
    if before and layer.parallel != "one norm":
        h_TD = apply_norm(norm, weights, x_TD, "mlp_norm")
    elif layer.parallel == "no":
        h_TD = x_TD
    if isinstance(layer.mlp, Experts):
        m_TD = expert_mlps(layer.mlp, weights, h_TD)
    else:
        m_TD = gated_mlp(layer.mlp, weights, h_TD)
    del h_TD
    if layer.parallel != "no":
        x_TD = added(x_TD, a_TD, "attention_out_norm")
    return added(x_TD, m_TD, "mlp_out_norm")


def head(spec: ModelSpec, weights: Weights, x_TD: Tensor) -> Tensor:
    """Logits (T, V) in float32; x_TD is left as it was.

    The product itself is in the dtype computed in, as in transformers; float32 keeps what
    follows (log-softmax, cuts) from losing more.
    """
    x_TS = apply_norm(spec.norm, weights, x_TD, "final_norm") if spec.final_norm else x_TD
    if spec.projected:
        x_TS = weights.linear(x_TS, "project_out")
    logits_TV = weights.linear(x_TS, "head").float()
    if spec.logit_scale != 1.0:
        logits_TV *= spec.logit_scale
    if spec.logit_cap is not None:
        logits_TV.div_(spec.logit_cap).tanh_().mul_(spec.logit_cap)
    return logits_TV


def _attention(
    attention: Attention, weights: Weights, h_TD: Tensor, attend: Attend, turns: Turns
) -> Tensor:
    """What comes out of attention, (T, H * E)."""
    q_THE, k_TKE, v_TKE = _projected(attention, weights, h_TD)
    del h_TD
    if not attention.norm_after_rope:
        q_THE, k_TKE = _head_norms(attention.head_norm, weights, q_THE, k_TKE)
    if attention.clip is not None:
        for x in (q_THE, k_TKE, v_TKE):
            x.clamp_(-attention.clip, attention.clip)
    if attention.rope is not None:
        of_queries = attention.query_rope or attention.rope
        rotate_(q_THE, *turns(of_queries), of_queries.interleaved)
        rotate_(k_TKE, *turns(attention.rope), attention.rope.interleaved)
    if attention.norm_after_rope:
        q_THE, k_TKE = _head_norms(attention.head_norm, weights, q_THE, k_TKE)
    sinks_H = weights.vector("sinks.weight") if attention.sinks else None
    return attend(q_THE, k_TKE, v_TKE, sinks_H).reshape(len(q_THE), attention.out_size)


def _projected(
    attention: Attention, weights: Weights, h_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, head by head."""
    num_tokens, head_dim = h_TD.shape[0], attention.head_dim
    products = weights.linears(h_TD, attention.projections)
    if attention.fused is not None:
        return _taken_apart(products[0], attention, attention.fused)
    q_THE, k_TKE, v_TKE = (x.view(num_tokens, -1, head_dim) for x in products)
    return q_THE, k_TKE, v_TKE


def _taken_apart(
    qkv_TF: Tensor, attention: Attention, fused: Fused
) -> tuple[Tensor, Tensor, Tensor]:
    heads = {"q": attention.num_heads, "k": attention.num_kv_heads, "v": attention.num_kv_heads}
    own = [heads[letter] // fused.num_parts for letter in fused.order]
    parts = qkv_TF.view(len(qkv_TF), fused.num_parts, sum(own), attention.head_dim).split(own, 2)
    by_letter = dict(zip(fused.order, parts, strict=True))
    q_THE, k_TKE, v_TKE = (by_letter[letter].flatten(1, 2) for letter in "qkv")
    return q_THE, k_TKE, v_TKE


def _head_norms(
    head_norm: HeadNorm | None, weights: Weights, q_THE: Tensor, k_TKE: Tensor
) -> tuple[Tensor, Tensor]:
    """Queries and keys after their norms, if there are any."""
    if head_norm is None:
        return q_THE, k_TKE

    def normed(x_THE: Tensor, part: str) -> Tensor:
        x_TF = x_THE.flatten(1) if head_norm.over == "all" else x_THE
        return apply_norm(head_norm.norm, weights, x_TF, part).view(x_THE.shape)

    return normed(q_THE, "q_norm"), normed(k_TKE, "k_norm")


def _latent_attention(
    attention: LatentAttention, weights: Weights, h_TD: Tensor, attend: Attend, turns: Turns
) -> Tensor:
    """What comes out of attention, (T, H * U), with keys and values left compressed.

    A head's key is kv_up_k @ c for the compressed vector c, so q . key = (q @ kv_up_k) . c: the
    query is mapped once, in place of every key; and so is the weighted sum of values.
    """
    heads, rank = attention.num_heads, attention.latent_dim
    if attention.query_rank is None:
        q_TF, kv_TF = weights.linears(h_TD, ("q", "kv_down"))
    else:
        down_TF, kv_TF = weights.linears(h_TD, ("q_down", "kv_down"))
        q_TF = weights.linear(apply_norm(attention.norm, weights, down_TF, "q_norm"), "q")
    q_THF = q_TF.view(len(q_TF), heads, attention.plain_dim + attention.rope_dim)
    key_TL = apply_norm(attention.norm, weights, kv_TF[:, :rank], "kv_norm")
    cos, sin = turns(attention.rope)
    turning_T1F, q_turning_THF = kv_TF[:, None, rank:], q_THF[..., attention.plain_dim :]
    rotate_(q_turning_THF, cos, sin, attention.rope.interleaved)
    rotate_(turning_T1F, cos, sin, attention.rope.interleaved)
    up_HFL = weights.matrix("kv_up").view(heads, attention.plain_dim + attention.value_dim, rank)
    up_k_HPL, up_v_HUL = up_HFL.split([attention.plain_dim, attention.value_dim], 1)
    q_plain_HTP = q_THF[..., : attention.plain_dim].transpose(0, 1)
    q_THL = torch.bmm(q_plain_HTP, up_k_HPL).transpose(0, 1)
    q_THE = torch.cat([q_THL, q_turning_THF], -1)
    k_T1E = torch.cat([key_TL[:, None], turning_T1F], -1)
    o_THL = attend(q_THE, k_T1E, None, None)[..., :rank]
    o_HTU = torch.bmm(o_THL.transpose(0, 1), up_v_HUL.mT)
    return o_HTU.transpose(0, 1).reshape(len(q_TF), attention.out_size)

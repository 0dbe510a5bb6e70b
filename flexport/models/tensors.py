"""The tensors of a model's layers, and what they take and cost.

The layers of the schedule are counted from 0: layer 0 is the embedding, 1 .. num_layers are the
decoder layers, and num_layers + 1 is the head. `layer_tensors` lists what one of them owns.

A slot is a tensor's name inside its layer, e.g. "q.weight" and "q.bias" of the linear map "q".
Matrices lie as (features out, features in), tables as (rows, features).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from flexport.models.spec import (
    Attention,
    Experts,
    HeadNorm,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
    Norm,
)

__all__ = [
    "Kind",
    "TensorSpec",
    "attention_flops",
    "distinct_layers",
    "expert_slot",
    "is_projection",
    "kv_bytes_per_token",
    "layer_bytes",
    "layer_flops",
    "layer_tensors",
    "num_parameters",
    "owned_tensors",
    "touched_values",
]

Kind = Literal["matrix", "operand", "table", "norm", "bias"]
"""A matrix is what x is multiplied with, an operand one that other products need as it is; a table is
read by rows, norms and biases are vectors, some of them one a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a layer: its slot, where a checkpoint may have it, and its shape."""

    slot: str
    names: tuple[str, ...]
    """Names it may have in a checkpoint; the first one found counts."""
    shape: tuple[int, ...]
    """As it lies in the file, without the dimension of `slice_of`."""
    kind: Kind
    transposed: bool = False
    """A matrix that lies as (features in, features out)."""
    expert: int | None = None
    """Which of a layer's experts it belongs to."""
    slice_of: tuple[int, int] | None = None
    """(i, n): it is the i-th of the n slices of the file's tensor, along its first dimension."""
    row: int | None = None
    """It is this row of its slot, whose rows are tensors of their own in the file."""
    exact: bool = False
    """It is computed with as the file has it, not rounded to the dtype computed in."""

    @property
    def num_values(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)

    @property
    def file_shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor."""
        if self.row is not None:
            return self.shape[1:]
        return self.shape if self.slice_of is None else (self.slice_of[1], *self.shape)


def layer_tensors(spec: ModelSpec, layer: int) -> tuple[TensorSpec, ...]:
    """The tensors of one layer of the schedule, in the order in which it uses them.

    A tied head lists the token table again, under the slot "head.weight" and with the checkpoint
    names of the embedding's.
    """
    assert 0 <= layer < spec.num_schedule_layers, layer
    if layer == 0:
        return tuple(_embed(spec))
    if layer == spec.head_layer:
        return tuple(_head(spec))
    return tuple(_decoder_layer(spec, layer - 1))


def owned_tensors(spec: ModelSpec, layer: int) -> tuple[TensorSpec, ...]:
    """The same, without a table that a tied head shares with the embedding: that is the head's."""
    tensors = layer_tensors(spec, layer)
    if layer == 0 and spec.tied_head:
        return tuple(tensor for tensor in tensors if tensor.slot != "tokens.weight")
    return tensors


def is_projection(tensor: TensorSpec) -> bool:
    """Whether a CPU beside the device may multiply with it: hidden states come to it first."""
    part = tensor.slot.removesuffix(".weight")
    return part in _FIRST_PARTS and tensor.kind == "matrix" and not tensor.transposed


_FIRST_PARTS = ("q", "k", "v", "qkv", "q_down", "kv_down")


def distinct_layers(spec: ModelSpec) -> dict[int, int]:
    """Of decoder layers that are alike, the first one of the schedule and how many they are."""
    first_of: dict[Layer, int] = {}
    counts: dict[int, int] = {}
    for index, layer in enumerate(spec.layers, start=1):
        first = first_of.setdefault(layer, index)
        counts[first] = counts.get(first, 0) + 1
    return counts


def expert_slot(part: str, expert: int) -> str:
    """The name of one expert's part, as slots have it."""
    return f"{part}@{expert}"


def _embed(spec: ModelSpec) -> Iterator[TensorSpec]:
    own = _Names(spec)
    yield own.weight("tokens", (spec.vocab_size, spec.embed_size), kind="table")
    if spec.projected:
        yield own.weight("project_in", (spec.hidden_size, spec.embed_size))
    if spec.learned_positions:
        yield own.weight("positions", (spec.learned_positions, spec.hidden_size), kind="table")
    if spec.embed_norm:
        yield from own.norm("embed_norm", spec.norm, (spec.hidden_size,))


def _head(spec: ModelSpec) -> Iterator[TensorSpec]:
    own = _Names(spec)
    if spec.final_norm:
        yield from own.norm("final_norm", spec.norm, (spec.hidden_size,))
    if spec.projected:
        yield own.weight("project_out", (spec.embed_size, spec.hidden_size))
    yield from own.linear("head", (spec.vocab_size, spec.embed_size), spec.head_bias)


def _decoder_layer(spec: ModelSpec, index: int) -> Iterator[TensorSpec]:
    layer, own = spec.layers[index], _Names(spec, index)
    two_norms = layer.parallel != "one norm"
    if layer.norms in ("input", "both"):
        yield from own.norm("attention_norm", spec.norm, (spec.hidden_size,))
    if isinstance(layer.attention, Attention):
        yield from _attention(spec, layer, layer.attention, own)
    else:
        yield from _latent_attention(spec, layer.attention, own)
    if layer.norms != "input":
        yield from own.norm("attention_out_norm", spec.norm, (spec.hidden_size,))
    if layer.norms in ("input", "both") and two_norms:
        yield from own.norm("mlp_norm", spec.norm, (spec.hidden_size,))
    if isinstance(layer.mlp, Experts):
        yield from _experts(spec, layer.mlp, own)
    else:
        yield from _mlp(spec, layer.mlp, own)
    if layer.norms != "input":
        yield from own.norm("mlp_out_norm", spec.norm, (spec.hidden_size,))


def _attention(
    spec: ModelSpec, layer: Layer, attention: Attention, own: _Names
) -> Iterator[TensorSpec]:
    hidden, turned = spec.hidden_size, layer.transposed
    q_size = attention.query_size
    kv_size = attention.num_kv_heads * attention.head_dim
    sizes = {"q": q_size, "k": kv_size, "v": kv_size, "qkv": q_size + 2 * kv_size}
    for part in attention.projections:
        yield from own.linear(part, (sizes[part], hidden), attention.bias, transposed=turned)
    if attention.head_norm is not None:
        for part, num_heads in (("q", attention.num_heads), ("k", attention.num_kv_heads)):
            shape = (num_heads, attention.head_dim)
            yield from _head_norm(attention.head_norm, own, f"{part}_norm", shape)
    if attention.sinks:
        yield own.tensor("sinks.weight", (attention.num_heads,), "bias")
    yield from own.linear("out", (hidden, q_size), attention.out_bias, transposed=turned)


def _head_norm(
    head_norm: HeadNorm, own: _Names, part: str, shape: tuple[int, int]
) -> Iterator[TensorSpec]:
    """Of so many heads with so many features."""
    num_heads, head_dim = shape
    if head_norm.apart:
        for head in range(num_heads):
            yield from own.norm(part, head_norm.norm, (1, head_dim), row=head)
        return
    of_all: dict[str, tuple[int, ...]] = {
        "head": (head_dim,),
        "each": shape,
        "all": (num_heads * head_dim,),
    }
    yield from own.norm(part, head_norm.norm, of_all[head_norm.over])


def _latent_attention(
    spec: ModelSpec, attention: LatentAttention, own: _Names
) -> Iterator[TensorSpec]:
    hidden, heads = spec.hidden_size, attention.num_heads
    q_shape = heads * (attention.plain_dim + attention.rope_dim)
    if attention.query_rank is None:
        yield from own.linear("q", (q_shape, hidden), bias=False)
    else:
        yield from own.linear("q_down", (attention.query_rank, hidden), attention.bias)
        yield from own.norm("q_norm", attention.norm, (attention.query_rank,))
        yield from own.linear("q", (q_shape, attention.query_rank), bias=False)
    yield from own.linear("kv_down", (attention.cache_dim, hidden), attention.bias)
    yield from own.norm("kv_norm", attention.norm, (attention.latent_dim,))
    up_size = heads * (attention.plain_dim + attention.value_dim)
    yield own.tensor("kv_up.weight", (up_size, attention.latent_dim), "operand")
    yield from own.linear("out", (hidden, attention.out_size), attention.out_bias)


def _mlp(
    spec: ModelSpec,
    mlp: Mlp,
    own: _Names,
    prefix: str = "",
    expert: int | None = None,
    slice_of: tuple[int, int] | None = None,
) -> Iterator[TensorSpec]:
    for part in (*mlp.inputs, "down"):
        out = {"down": spec.hidden_size, "gate_up": 2 * mlp.size}.get(part, mlp.size)
        into = mlp.size if part == "down" else spec.hidden_size
        yield from own.linear(
            prefix + part,
            (out, into),
            mlp.bias,
            transposed=mlp.transposed,
            expert=expert,
            slice_of=slice_of,
        )


def _experts(spec: ModelSpec, experts: Experts, own: _Names) -> Iterator[TensorSpec]:
    num_experts = experts.num_experts
    # What the router has is exact: among many experts, rounding changes which are picked.
    yield own.tensor("router.weight", (num_experts, spec.hidden_size), "operand", exact=True)
    if experts.router_bias:
        yield own.tensor("router.bias", (num_experts,), "bias", exact=True)
    if experts.correction != "no":
        row = (0, 1) if experts.correction == "row" else None
        yield own.tensor("router.correction", (num_experts,), "bias", slice_of=row, exact=True)
    if experts.shared is not None:
        yield from _mlp(spec, experts.shared, own, "shared_")
        if experts.shared_gate:
            yield from own.linear("shared_router", (1, spec.hidden_size), bias=False)
    for expert in range(num_experts):
        slice_of = (expert, num_experts) if experts.stacked else None
        yield from _mlp(spec, experts.mlp, own, "expert_", expert, slice_of)


@dataclass(frozen=True, slots=True)
class _Names:
    """Makes the tensors of one layer of the schedule."""

    spec: ModelSpec
    index: int = 0

    def tensor(
        self,
        slot: str,
        shape: tuple[int, ...],
        kind: Kind,
        *,
        transposed: bool = False,
        expert: int | None = None,
        slice_of: tuple[int, int] | None = None,
        row: int | None = None,
        exact: bool = False,
    ) -> TensorSpec:
        part, _, suffix = slot.rpartition(".")
        whole = self.spec.names.get(slot)
        templates = whole or tuple(f"{name}.{suffix}" for name in self.spec.names[part])
        names = tuple(name.format(i=self.index, e=expert, h=row) for name in templates)
        if expert is not None:
            slot = f"{expert_slot(part, expert)}.{suffix}"
        return TensorSpec(
            slot=slot,
            names=names,
            shape=shape[::-1] if transposed else shape,
            kind=kind,
            transposed=transposed,
            expert=expert,
            slice_of=slice_of,
            row=row,
            exact=exact,
        )

    def weight(self, part: str, shape: tuple[int, int], kind: Kind = "matrix") -> TensorSpec:
        return self.tensor(f"{part}.weight", shape, kind)

    def linear(
        self,
        part: str,
        shape: tuple[int, int],
        bias: bool,
        *,
        transposed: bool = False,
        expert: int | None = None,
        slice_of: tuple[int, int] | None = None,
    ) -> Iterator[TensorSpec]:
        yield self.tensor(
            f"{part}.weight", shape, "matrix",
            transposed=transposed, expert=expert, slice_of=slice_of,
        )  # fmt: skip
        if bias:
            yield self.tensor(f"{part}.bias", shape[:1], "bias", expert=expert, slice_of=slice_of)

    def norm(
        self, part: str, norm: Norm, shape: tuple[int, ...], row: int | None = None
    ) -> Iterator[TensorSpec]:
        if norm.weight:
            yield self.tensor(f"{part}.weight", shape, "norm", row=row)
        if norm.bias:
            yield self.tensor(f"{part}.bias", shape, "norm", row=row)


def layer_bytes(spec: ModelSpec, layer: int, item_bytes: float) -> int:
    """Bytes of one layer's tensors at `item_bytes` a value."""
    num_values = sum(tensor.num_values for tensor in layer_tensors(spec, layer))
    return math.ceil(num_values * item_bytes)


def kv_bytes_per_token(spec: ModelSpec, layer: int, item_bytes: float) -> int:
    """Bytes that one token takes in the cache of one decoder layer, counted from 0."""
    attention = spec.layers[layer].attention
    values = attention.cache_planes * attention.cache_heads * attention.cache_dim
    return math.ceil(values * item_bytes)


def layer_flops(spec: ModelSpec, layer: int) -> int:
    """Multiplications and additions of one layer's matrix products for one token.

    Of experts, those that the token passes.
    """
    total = 0.0
    experts = spec.layers[layer - 1].mlp if 0 < layer < spec.head_layer else None
    for tensor in layer_tensors(spec, layer):
        if tensor.kind in ("matrix", "operand"):
            share = 1.0
            if tensor.expert is not None and isinstance(experts, Experts):
                share = experts.top_k / experts.num_experts
            total += 2 * share * tensor.num_values
    return round(total)


def touched_values(spec: ModelSpec, layer: int) -> int:
    """Values of one token that a layer's work beside its products and its attention passes through.

    That is what goes into norms, turns, activations and sums, what comes out of attention, and what is
    new in the cache, each counted once. Of experts, those that the token passes: its states are
    taken to each, and come back. The embedding's are the rows of its tables, and the head's the
    states before its product; logits are not among them.
    """
    hidden = spec.hidden_size
    if layer == 0:
        tables = 1 + bool(spec.learned_positions) + spec.embed_norm
        return tables * hidden
    if layer == spec.head_layer:
        return hidden if spec.final_norm else 0
    own = spec.layers[layer - 1]
    halves = 2 * hidden  # their sums
    norms = {"input": 2, "output": 2, "both": 4, "sum": 2}[own.norms]
    norms -= own.parallel == "one norm"
    return halves + norms * hidden + _attention_touched(own.attention) + _mlp_touched(spec, own.mlp)


def _attention_touched(attention: Attention | LatentAttention) -> int:
    new = attention.cache_planes * attention.cache_heads * attention.cache_dim
    total = attention.out_size + new
    if isinstance(attention, LatentAttention):
        # Compressed vectors have norms; queries are put together of two parts.
        turned = (attention.num_heads + 1) * attention.rope_dim
        return total + turned + attention.query_size + (attention.query_rank or 0) + new
    keys = attention.num_kv_heads * attention.head_dim
    if attention.rope is not None:
        heads = attention.num_heads + attention.num_kv_heads
        total += heads * attention.rope.num_features
    if attention.head_norm is not None:
        total += attention.query_size + keys
    if attention.clip is not None:
        total += attention.query_size + 2 * keys
    return total


def _mlp_touched(spec: ModelSpec, mlp: Mlp | Experts) -> int:
    if isinstance(mlp, Mlp):
        return (2 if mlp.gated else 1) * mlp.size
    shared = 0
    if mlp.shared is not None:
        shared = _mlp_touched(spec, mlp.shared) + spec.hidden_size
    moved = 2 * spec.hidden_size
    return mlp.num_experts + mlp.top_k * (_mlp_touched(spec, mlp.mlp) + moved) + shared


def attention_flops(spec: ModelSpec, layer: int, num_keys: int) -> int:
    """Multiplications and additions of one query token in one decoder layer, counted from 0.

    There are `num_keys` keys before it and of itself, of which a window shows the last.
    """
    attention = spec.layers[layer].attention
    seen = num_keys if attention.window is None else min(num_keys, attention.window)
    return 4 * attention.query_size * seen


def num_parameters(spec: ModelSpec) -> int:
    """Distinct values of the model; a tied head's table counts once."""
    total = layer_bytes(spec, 0, 1) + layer_bytes(spec, spec.head_layer, 1)
    for layer, count in distinct_layers(spec).items():
        total += count * layer_bytes(spec, layer, 1)
    return total - spec.vocab_size * spec.embed_size if spec.tied_head else total

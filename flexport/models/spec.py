"""What a decoder-only model is, as plain data: its layers, their tensors and what they cost.

A `ModelSpec` says everything the decoder needs to know about a model and how it differs from
others; it knows no torch and no tiers, so that plans can be made without either. The layers of
the schedule are counted from 0: layer 0 is the embedding, 1 .. num_layers are the decoder layers,
and num_layers + 1 is the head. `layer_tensors` lists what one of them owns.

A slot is a tensor's name inside its layer, e.g. "q.weight" and "q.bias" of the linear map "q".
Matrices lie as (features out, features in), tables as (rows, features).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from flexport.errors import UnsupportedModel
from flexport.models.rope import Rope

__all__ = [
    "Activation",
    "Attention",
    "ClampedSilu",
    "Experts",
    "Fused",
    "HeadNorm",
    "Kind",
    "LatentAttention",
    "Layer",
    "Mlp",
    "ModelSpec",
    "Norm",
    "Norms",
    "Parallel",
    "TensorSpec",
    "attention_flops",
    "distinct_layers",
    "expert_slot",
    "flops_per_token",
    "is_projection",
    "kv_bytes_per_token",
    "layer_bytes",
    "layer_flops",
    "layer_tensors",
    "num_parameters",
    "owned_tensors",
    "touched_values",
]

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "silu"]
"""relu; its square; gelu with the exact erf; gelu with the tanh approximation; x * sigmoid(x)."""

Kind = Literal["matrix", "operand", "table", "norm", "bias"]
"""A matrix is what x is multiplied with, an operand one that other products need as it is; a table is
read by rows, norms and biases are vectors, some of them one a head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over features."""

    kind: Literal["layer", "rms"]
    """(x - mean) / sqrt(variance + eps), or x / sqrt(mean square + eps)."""
    eps: float
    weight: bool = True
    bias: bool = False
    plus_one: bool = False
    """Weights are stored less 1."""
    wide: bool = False
    """Of a norm by the mean square: weights are multiplied in float32, and the product is rounded; else
    what they are multiplied with was rounded. Those of a layer norm always are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadNorm:
    """A norm of queries and keys before they turn."""

    norm: Norm
    over: Literal["head", "each", "all"]
    """Of each head, with one weight for all of them or with weights of its own; or of all heads
    together."""
    apart: bool = False
    """In the checkpoint each head's own weights are a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """How queries, keys and values lie in one projection's features.

    There are num_parts equal stretches, each with its share of the query heads, of the key heads and
    of the value heads, in this order of the letters.
    """

    num_parts: int = 1
    order: Literal["qkv", "qvk"] = "qkv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Softmax attention with grouped heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    """What a query-key product is multiplied by."""
    fused: Fused | None = None
    """None: queries, keys and values have projections of their own."""
    bias: bool = False
    """Whether these projections have biases."""
    out_bias: bool = False
    rope: Rope | None = None
    query_rope: Rope | None = None
    """How queries turn, where not as keys do."""
    head_norm: HeadNorm | None = None
    norm_after_rope: bool = False
    clip: float | None = None
    """Queries, keys and values are clipped to -clip .. clip before they turn."""
    window: int | None = None
    """Tokens that a query sees, itself included."""
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    """ALiBi, one a query head (arXiv:2108.12409)."""
    sinks: bool = False
    """Each query head has an extra logit without a value."""

    @property
    def query_size(self) -> int:
        """Features of all queries of a token."""
        return self.num_heads * self.head_dim

    @property
    def out_size(self) -> int:
        """Features of what comes out, before the output projection."""
        return self.query_size

    @property
    def cache_heads(self) -> int:
        """Key/value heads in the cache."""
        return self.num_kv_heads

    @property
    def cache_dim(self) -> int:
        """Features of a head in the cache, and of a query as it meets them."""
        return self.head_dim

    @property
    def cache_planes(self) -> int:
        """Keys and values."""
        return 2

    @property
    def projections(self) -> tuple[str, ...]:
        """The parts that a token's hidden state is multiplied with first."""
        return ("q", "k", "v") if self.fused is None else ("qkv",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Attention over one compressed vector a token, from which all heads' keys and values come.

    The cache holds that vector and one key of rope_dim features that turns; queries are mapped to
    the compressed space, so nothing is expanded (multi-head latent attention, arXiv:2405.04434,
    section 2.1).
    """

    num_heads: int
    query_rank: int | None
    """Width of the compressed queries; None where they are not compressed."""
    latent_dim: int
    plain_dim: int
    """Features of a query or key that do not turn."""
    rope_dim: int
    value_dim: int
    scale: float
    rope: Rope
    norm: Norm
    """Of compressed queries, keys and values."""
    bias: bool = False
    out_bias: bool = False
    window: None = None
    soft_cap: None = None
    slopes: None = None
    sinks: Literal[False] = False

    @property
    def query_size(self) -> int:
        """Features of all queries of a token, as they meet the cache."""
        return self.num_heads * self.cache_dim

    @property
    def out_size(self) -> int:
        """Features of what comes out, before the output projection."""
        return self.num_heads * self.value_dim

    @property
    def cache_heads(self) -> int:
        """One for all query heads."""
        return 1

    @property
    def cache_dim(self) -> int:
        """Features of the compressed vector and of the key that turns."""
        return self.latent_dim + self.rope_dim

    @property
    def cache_planes(self) -> int:
        """Keys are values, too."""
        return 1

    @property
    def projections(self) -> tuple[str, ...]:
        """The parts that a token's hidden state is multiplied with first."""
        return ("q" if self.query_rank is None else "q_down", "kv_down")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClampedSilu:
    """gpt-oss's gate: (up + 1) * gate * sigmoid(steepness * gate), gate and up clamped first.

    The gate is at most `limit`, up is within -limit .. limit.
    """

    limit: float
    steepness: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """Two or three matrices and an activation: down(act(gate(x)) * up(x)), or down(act(up(x)))."""

    size: int
    activation: Activation | ClampedSilu
    """Only a gated one can be clamped."""
    gated: bool = False
    fused: Literal["no", "halves", "pairs"] = "no"
    """Gate and up are one matrix: its first and its second half, or its even and its odd rows."""
    bias: bool = False
    transposed: bool = False
    """Matrices lie as (features in, features out)."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The parts that x is multiplied with."""
        if not self.gated:
            return ("up",)
        return ("gate", "up") if self.fused == "no" else ("gate_up",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Many MLPs, of which a router picks a few for each token."""

    num_experts: int
    top_k: int
    mlp: Mlp
    scores: Literal["softmax", "sigmoid"] = "softmax"
    """What logits become, over all experts."""
    normalised: bool = True
    """The picked ones' scores are divided by their sum."""
    scale: float = 1.0
    """What scores are multiplied by in the end."""
    router_bias: bool = False
    correction: Literal["no", "vector", "row"] = "no"
    """A number is added to each expert's score when it is picked, and only then. In the checkpoint
    they are a vector, or the one row of a matrix."""
    num_groups: int = 1
    top_groups: int = 1
    """Experts are picked from the best groups, by the sum of a group's group_best best scores."""
    group_best: int = 1
    stacked: bool = False
    """In the checkpoint all experts' matrices are one tensor."""
    shared: Mlp | None = None
    """An MLP that every token passes."""
    shared_gate: bool = False
    """Its output is multiplied by a sigmoid."""

    def __post_init__(self) -> None:
        of_group = self.num_experts / self.num_groups
        if (
            self.num_experts % self.num_groups
            or self.top_groups > self.num_groups
            or self.group_best > of_group
            or self.top_k > self.top_groups * of_group
        ):
            raise UnsupportedModel(
                f"{self.top_k} experts can't be picked from the {self.top_groups} best of "
                f"{self.num_groups} groups of {of_group:g} experts, by the {self.group_best} best "
                "of each"
            )


Norms = Literal["input", "output", "both", "sum"]
"""Where a layer's halves have their norms: before; behind, before the sum; both; after the sum."""

Parallel = Literal["no", "one norm", "two norms"]
"""Whether a layer's halves take the same x, and through one norm or one each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: x + attention, then + MLP; or both from the same x."""

    attention: Attention | LatentAttention
    mlp: Mlp | Experts
    norms: Norms = "input"
    parallel: Parallel = "no"
    transposed: bool = False
    """Attention's matrices lie as (features in, features out)."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only model: its sizes, its choices and its checkpoint's names."""

    family: str
    vocab_size: int
    hidden_size: int
    layers: tuple[Layer, ...]
    norm: Norm
    """Every norm over the hidden size."""
    max_positions: int
    """Tokens that a row may have, prompt and continuation together."""
    tied_head: bool
    """Whether the head multiplies by the token table."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    names: Mapping[str, tuple[str, ...]] = field(hash=False, repr=False)
    """Checkpoint names of each part ("q", "tokens", …), without ".weight" and ".bias", or of a slot
    ("router.bias"), in full. "{i}" is the decoder layer, "{e}" the expert, "{h}" the head where heads
    are apart, counted from 0."""
    embed_size: int = 0
    """Width of the token table; where it is not hidden_size, projections stand in between.
    0 is hidden_size."""
    learned_positions: int = 0
    """Rows of a table of positions; 0: there is none."""
    position_offset: int = 0
    """Its row that belongs to position 0."""
    embed_norm: bool = False
    """Whether a norm stands after the embedding."""
    embed_scale: float = 1.0
    """What embeddings are multiplied by, rounded to the dtype computed in."""
    residual_scale: float = 1.0
    """What a layer's halves are multiplied by before they are added."""
    final_norm: bool = True
    """Whether a norm stands before the head."""
    head_bias: bool = False
    logit_scale: float = 1.0
    logit_cap: float | None = None
    """Logits become cap * tanh(logit / cap)."""
    unused: tuple[str, ...] = ()
    """How names begin of tensors that a checkpoint has and that are no part of this model: layers for
    training, or the parts of a larger model that it is the text part of."""

    def __post_init__(self) -> None:
        if not self.embed_size:
            object.__setattr__(self, "embed_size", self.hidden_size)
        for name in ("vocab_size", "hidden_size", "embed_size", "max_positions"):
            assert getattr(self, name) >= 1, (name, getattr(self, name))
        assert self.layers, "no layers"
        for layer in self.layers:
            attention = layer.attention
            assert attention.num_heads % attention.cache_heads == 0, attention

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def num_schedule_layers(self) -> int:
        """Layers as the schedule counts them: embedding, decoder layers, head."""
        return self.num_layers + 2

    @property
    def head_layer(self) -> int:
        """Index of the head among the schedule's layers; the embedding's is 0."""
        return self.num_layers + 1

    @property
    def projected(self) -> bool:
        """Whether the token table is of another width than the decoder layers."""
        return self.embed_size != self.hidden_size


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


def flops_per_token(spec: ModelSpec, num_keys: int = 0) -> int:
    """All multiplications and additions of one token that sees `num_keys` keys, head included."""
    ends = layer_flops(spec, 0) + layer_flops(spec, spec.head_layer)
    return ends + sum(
        count * (layer_flops(spec, layer) + attention_flops(spec, layer - 1, num_keys))
        for layer, count in distinct_layers(spec).items()
    )


def num_parameters(spec: ModelSpec) -> int:
    """Distinct values of the model; a tied head's table counts once."""
    total = layer_bytes(spec, 0, 1) + layer_bytes(spec, spec.head_layer, 1)
    for layer, count in distinct_layers(spec).items():
        total += count * layer_bytes(spec, layer, 1)
    return total - spec.vocab_size * spec.embed_size if spec.tied_head else total

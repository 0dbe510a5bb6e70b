"""What a model is, as numbers: the record that every family's config is turned into.

A `ModelSpec` says how large each part is and which of the decoder's choices apply; it knows no
torch and no tiers, so that plans can be made without either. The layers of the schedule are
counted from 0: layer 0 is the embedding, 1 .. num_layers are the decoder layers, and
num_layers + 1 is the head. `layer_tensors` lists what one of them owns.

A slot is a tensor's name inside its layer, e.g. "q.weight" and "q.bias" of the linear map "q".
Matrices lie as (features out, features in), tables as (rows, features).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Activation",
    "Kind",
    "ModelSpec",
    "TensorSpec",
    "attention_flops",
    "flops_per_token",
    "kv_bytes_per_token",
    "layer_bytes",
    "layer_flops",
    "layer_tensors",
    "num_parameters",
    "owned_tensors",
]

Activation = Literal["relu", "gelu", "gelu_tanh", "silu"]
"""relu; gelu with the exact erf; gelu with the tanh approximation; x * sigmoid(x)."""

Kind = Literal["matrix", "table", "norm", "bias"]
"""A matrix is multiplied by whole, a table is read by rows, norms and biases are vectors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor of a layer: its slot, where a checkpoint may have it, and its shape."""

    slot: str
    names: tuple[str, ...]
    """Names it may have in a checkpoint; the first one found counts."""
    shape: tuple[int, ...]
    kind: Kind

    @property
    def num_values(self) -> int:
        """How many numbers the tensor holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """One decoder-only model: its sizes, its choices and its checkpoint's names."""

    family: str
    vocab_size: int
    hidden_size: int
    embed_size: int
    """Width of the token table; where it is not hidden_size, projections stand in between."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    """Tokens that a row may have, prompt and continuation together."""
    position_offset: int
    """Row of the position table that belongs to position 0."""
    norm_place: Literal["pre", "post"]
    """Whether a norm stands before each half of a layer or after its residual sum."""
    norm_eps: float
    norm_affine: bool
    """Whether norms have a weight and a bias."""
    final_norm: bool
    """Whether a norm stands before the head."""
    activation: Activation
    linear_bias: bool
    """Whether the linear maps of the decoder layers have biases."""
    tied_head: bool
    """Whether the head multiplies by the token table."""
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    names: Mapping[str, tuple[str, ...]] = field(hash=False, repr=False)
    """Checkpoint names of each part ("q", "tokens", …), without ".weight" and ".bias".

    "{i}" stands for the decoder layer, counted from 0.
    """

    def __post_init__(self) -> None:
        sizes = (
            "vocab_size", "hidden_size", "embed_size", "num_layers", "num_heads", "num_kv_heads",
            "head_dim", "mlp_size", "max_positions",
        )  # fmt: skip
        for name in sizes:
            assert getattr(self, name) >= 1, (name, getattr(self, name))
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)

    @property
    def num_schedule_layers(self) -> int:
        """Layers as the schedule counts them: embedding, decoder layers, head."""
        return self.num_layers + 2

    @property
    def head_layer(self) -> int:
        """Index of the head among the schedule's layers; the embedding's is 0."""
        return self.num_layers + 1

    @property
    def attention_scale(self) -> float:
        """What a query-key product is multiplied by."""
        return float(self.head_dim**-0.5)

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


def _embed(spec: ModelSpec) -> Iterator[TensorSpec]:
    table_shape = (spec.vocab_size, spec.embed_size)
    yield _weight(spec, "tokens", table_shape, kind="table")
    if spec.projected:
        yield _weight(spec, "project_in", (spec.hidden_size, spec.embed_size))
    num_rows = spec.max_positions + spec.position_offset
    yield _weight(spec, "positions", (num_rows, spec.hidden_size), kind="table")


def _decoder_layer(spec: ModelSpec, index: int) -> Iterator[TensorSpec]:
    hidden = spec.hidden_size
    q_size, kv_size = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    yield from _norm(spec, "attention_norm", index)
    for part, shape in (
        ("q", (q_size, hidden)),
        ("k", (kv_size, hidden)),
        ("v", (kv_size, hidden)),
        ("out", (hidden, q_size)),
    ):
        yield from _linear(spec, part, shape, index)
    yield from _norm(spec, "mlp_norm", index)
    yield from _linear(spec, "up", (spec.mlp_size, hidden), index)
    yield from _linear(spec, "down", (hidden, spec.mlp_size), index)


def _head(spec: ModelSpec) -> Iterator[TensorSpec]:
    if spec.final_norm:
        yield from _norm(spec, "final_norm")
    if spec.projected:
        yield _weight(spec, "project_out", (spec.embed_size, spec.hidden_size))
    yield _weight(spec, "head", (spec.vocab_size, spec.embed_size))


def _weight(
    spec: ModelSpec, part: str, shape: tuple[int, ...], index: int = 0, kind: Kind = "matrix"
) -> TensorSpec:
    return TensorSpec(
        slot=f"{part}.weight", names=_names(spec, part, "weight", index), shape=shape, kind=kind
    )


def _bias(spec: ModelSpec, part: str, size: int, index: int, kind: Kind) -> TensorSpec:
    return TensorSpec(
        slot=f"{part}.bias", names=_names(spec, part, "bias", index), shape=(size,), kind=kind
    )


def _linear(spec: ModelSpec, part: str, shape: tuple[int, int], index: int) -> Iterator[TensorSpec]:
    yield _weight(spec, part, shape, index)
    if spec.linear_bias:
        yield _bias(spec, part, shape[0], index, "bias")


def _norm(spec: ModelSpec, part: str, index: int = 0) -> Iterator[TensorSpec]:
    if spec.norm_affine:
        yield _weight(spec, part, (spec.hidden_size,), index, "norm")
        yield _bias(spec, part, spec.hidden_size, index, "norm")


def _names(spec: ModelSpec, part: str, suffix: str, index: int) -> tuple[str, ...]:
    return tuple(f"{name.format(i=index)}.{suffix}" for name in spec.names[part])


def layer_bytes(spec: ModelSpec, layer: int, item_bytes: float) -> int:
    """Bytes of one layer's tensors at `item_bytes` a value."""
    num_values = sum(tensor.num_values for tensor in layer_tensors(spec, layer))
    return math.ceil(num_values * item_bytes)


def kv_bytes_per_token(spec: ModelSpec, item_bytes: float) -> int:
    """Bytes that one token's keys and values take in ONE decoder layer."""
    return math.ceil(2 * spec.num_kv_heads * spec.head_dim * item_bytes)


def layer_flops(spec: ModelSpec, layer: int) -> int:
    """Multiplications and additions of one layer's matrix products for one token."""
    matrices = (tensor for tensor in layer_tensors(spec, layer) if tensor.kind == "matrix")
    return sum(2 * tensor.num_values for tensor in matrices)


def attention_flops(spec: ModelSpec, num_keys: int) -> int:
    """Multiplications and additions of one query token over `num_keys` keys in ONE layer."""
    return 4 * spec.num_heads * spec.head_dim * num_keys


def flops_per_token(spec: ModelSpec, num_keys: int = 0) -> int:
    """All multiplications and additions of one token that sees `num_keys` keys, head included."""
    products = sum(layer_flops(spec, layer) for layer in range(spec.num_schedule_layers))
    return products + spec.num_layers * attention_flops(spec, num_keys)


def num_parameters(spec: ModelSpec) -> int:
    """Distinct values of the model; a tied head's table counts once."""
    total = sum(layer_bytes(spec, layer, 1) for layer in range(spec.num_schedule_layers))
    return total - spec.vocab_size * spec.embed_size if spec.tied_head else total

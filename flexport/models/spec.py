"""What a decoder-only model is, as plain data.

A `ModelSpec` says everything the decoder needs to know about a model and how it differs from
others; it knows no torch and no tiers, so that plans can be made without either. What tensors
follow from it, `models.tensors` lists.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    "LatentAttention",
    "Layer",
    "Mlp",
    "ModelSpec",
    "Norm",
    "Norms",
    "Parallel",
]

Activation = Literal["relu", "relu_squared", "gelu", "gelu_tanh", "silu"]
"""relu; its square; gelu with the exact erf; gelu with the tanh approximation; x * sigmoid(x)."""


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

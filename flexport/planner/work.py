"""What a model does with a token, counted: products, attention, values touched on the way.

The bytes of the same model are `footprint.ModelSizes`; together with a machine's rates they give
the time that a visit takes (`costs`).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerWork", "Matrices", "ModelWork"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """The values that a token is multiplied with."""

    plain_values: int = 0
    """Of matrices that lie as numbers."""
    packed_values: int = 0
    """Of those that lie packed in the model's codec."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWork:
    """One decoder layer, or the many that are alike."""

    num_layers: int
    dense: Matrices
    """Of each layer, what every token passes."""
    expert: Matrices | None = None
    """Of one expert."""
    num_experts: int = 0
    top_k: int = 0
    """Experts that a token passes."""
    touched_values: int
    """Values of one token that norms, rotations, activations and sums pass through."""
    score_flops: int
    """Multiplications and additions of a query token and one key that it sees, all heads."""
    queries: int
    """Query heads that share a key/value head."""
    window: int | None = None
    caches: int = 0
    """Which of `footprint.ModelSizes.caches` is this layer's."""

    def seen_pairs(self, begin: int, end: int) -> float:
        """Pairs of a query and a key that it sees, for the queries of columns begin .. end-1."""
        if self.window is None or end <= self.window:
            return (end * (end + 1) - begin * (begin + 1)) / 2
        full = max(0, end - max(begin, self.window))
        short = max(begin, min(end, self.window))
        return full * self.window + (short * (short + 1) - begin * (begin + 1)) / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """All layers of a model."""

    layers: tuple[LayerWork, ...]
    """Kinds of decoder layers, each once."""
    order: tuple[int, ...]
    """The kind of each decoder layer."""
    head: Matrices
    """The head, projections before it included."""
    vocab_size: int
    hidden_size: int
    codec: str = "none"
    """What `packed_values` lie in: a codec's name without its group, or a published form's."""

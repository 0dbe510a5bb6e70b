"""The angles by which a visit's queries and keys turn, worked out once for all layers alike.

Dimension key: T tokens, P pairs of features that turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flexport.backend import Backend
from flexport.engine.transfer import to_device
from flexport.models.rope import Rope

__all__ = ["VisitTurns"]


class VisitTurns:
    """Cosines and sines of some tokens' angles, for whichever rope asks."""

    def __init__(
        self,
        backend: Backend,
        dtype: torch.dtype,
        positions: Sequence[int],
        lengths: Sequence[int],
        limits: Sequence[int],
    ) -> None:
        """For each token its position, how long its row is, and how long that may become."""
        self._backend = backend
        self._dtype = dtype
        self._positions_T = torch.tensor(positions, dtype=torch.float32)
        self._lengths = lengths
        self._limits = limits
        self._made: dict[Rope, tuple[Tensor, Tensor]] = {}

    def __call__(self, rope: Rope) -> tuple[Tensor, Tensor]:
        """Both (T, 1, P) on the device, worked out in float32."""
        if rope not in self._made:
            angles_T1P = (self._positions_T[:, None] * self._frequencies(rope))[:, None]
            magnitude = self._magnitude(rope)
            both = (angles_T1P.cos() * magnitude, angles_T1P.sin() * magnitude)
            cos_T1P, sin_T1P = (to_device(self._backend, x.to(self._dtype)) for x in both)
            self._made[rope] = cos_T1P, sin_T1P
        return self._made[rope]

    def _magnitude(self, rope: Rope) -> float | Tensor:
        """One for all tokens, or for each its own."""
        if rope.growth is None:
            return rope.magnitude
        own = [rope.magnitude_at(int(position)) for position in self._positions_T]
        return torch.tensor(own)[:, None, None]

    def _frequencies(self, rope: Rope) -> Tensor:
        """One line for all tokens, or for each its own."""
        if not rope.depends_on_length:
            return torch.tensor(rope.frequencies)
        lines: dict[tuple[float, ...], int] = {}
        of_token = [
            lines.setdefault(rope.at(*own), len(lines))
            for own in zip(self._lengths, self._limits, strict=True)
        ]
        return torch.tensor(list(lines))[torch.tensor(of_token, dtype=torch.int64)]

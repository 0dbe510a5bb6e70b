"""Rotary position embedding: which angles a head's features turn by, in all published scalings.

A pair of features with inverse frequency f turns by position * f. The scalings change the
frequencies so that a model trained on short texts reads longer ones. Source: RoPE,
arXiv:2104.09864; linear, arXiv:2306.15595; YaRN, arXiv:2309.00071; LongRoPE, arXiv:2402.13753;
the dynamic base and Llama 3.1's bands have no paper and are what transformers computes.

Two scalings depend on how long a row is. That must not depend on what else is computed with it,
so the length is the row's own: "dynamic" takes the tokens that the row has when the token is
computed (its whole prompt, or all up to the token), "longrope" the tokens that the row may come to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from flexport.models.config import Config

__all__ = ["Rope", "plain_rope", "read_rope", "rope_fields", "rope_type", "score_scale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """How queries and keys of a layer turn."""

    frequencies: tuple[float, ...]
    """Radians a position, one a pair of features; the pairs are a head's first features."""
    interleaved: bool = False
    """Pairs are neighbours, (0, 1), (2, 3), …; else halves, (0, n), (1, n + 1), …"""
    magnitude: float = 1.0
    """What sines and cosines are multiplied by."""
    growth: tuple[float, int] | None = None
    """(b, n): and by 1 + b * log(1 + floor(position / n)) at each position."""
    long_frequencies: tuple[float, ...] | None = None
    """For rows that may come to more than original_length tokens."""
    original_length: int = 0
    dynamic: Dynamic | None = None
    """For tokens computed when their row has more than original_length."""
    reach: int = 0
    """Tokens that a scaling is said to stretch a row to; 0: no more than without."""

    @property
    def num_features(self) -> int:
        """Features of a head that turn."""
        return 2 * len(self.frequencies)

    def magnitude_at(self, position: int) -> float:
        """What sines and cosines of a position are multiplied by."""
        if self.growth is None:
            return self.magnitude
        slope, step = self.growth
        return self.magnitude * (1 + slope * math.log1p(position // step))

    @property
    def depends_on_length(self) -> bool:
        """Whether rows of different lengths turn differently."""
        return self.long_frequencies is not None or self.dynamic is not None

    def at(self, length: int, limit: int) -> tuple[float, ...]:
        """The frequencies for a row of `length` tokens that may come to `limit`."""
        if self.long_frequencies is not None and limit > self.original_length:
            return self.long_frequencies
        if self.dynamic is not None and length > self.original_length:
            return self.dynamic.frequencies(length, self.original_length)
        return self.frequencies


@dataclass(frozen=True, slots=True, kw_only=True)
class Dynamic:
    """A base that grows with the row."""

    base: float
    factor: float
    num_features: int

    def frequencies(self, length: int, original_length: int) -> tuple[float, ...]:
        """Those of a row of `length` tokens."""
        size = self.num_features
        stretch = self.factor * length / original_length - (self.factor - 1)
        return _frequencies(self.base * stretch ** (size / (size - 2)), size)


def plain_rope(num_features: int, *, base: float = 1e4, interleaved: bool = False) -> Rope:
    """The rope of a model whose config knows no scalings: so many features of a head turn."""
    return Rope(frequencies=_frequencies(base, num_features), interleaved=interleaved)


def read_rope(
    config: Config,
    *,
    head_dim: int,
    max_positions: int,
    layer_type: str | None = None,
    theta_name: str = "rope_theta",
    interleaved: bool = False,
) -> Rope:
    """The rope that a config asks for, in transformers' old form or its new one.

    Old configs have rope_theta, rope_scaling and partial_rotary_factor side by side, new ones all
    of it in rope_parameters, for each layer type if these differ. Where the part that turns is an odd
    number of features, one more turns, as in transformers. Raises UnsupportedModel for an unknown
    scaling, and where a head has no such features.
    """
    given = rope_fields(config, layer_type)
    base = given.number("rope_theta", config.number(theta_name, 1e4))
    share = given.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    size = int(head_dim * share)
    if not 0 < size + size % 2 <= head_dim:
        raise config.unsupported(
            f"{size} of a head's {head_dim} features turn", "whole pairs of a head's features"
        )
    kind = rope_type(given)
    build = _SCALINGS.get(kind)
    if build is None:
        raise config.unsupported(f"rope_type is {kind!r}", f"one of {', '.join(sorted(_SCALINGS))}")
    original = given.count(
        "original_max_position_embeddings",
        config.count("original_max_position_embeddings", max_positions),
    )
    rope = build(_Asked(given, base, size, max_positions, original))
    return replace(rope, interleaved=interleaved)


def rope_fields(config: Config, layer_type: str | None = None) -> Config:
    """Where a config says how its layers of a type turn."""
    # Where layers differ, the old form scales those that see the whole row.
    old = {} if layer_type == "sliding_attention" else config.mapping("rope_scaling")
    values = old or config.mapping("rope_parameters")
    own = values.get(layer_type) if layer_type is not None else None
    return config.within("rope", own if isinstance(own, Mapping) else values)


def rope_type(given: Config) -> str:
    """The scaling that rope fields ask for, under its new name or its old one."""
    return given.word("rope_type", given.word("type", "default"))


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a scaling is made from."""

    given: Config
    base: float
    size: int
    max_positions: int
    original: int

    @property
    def frequencies(self) -> tuple[float, ...]:
        return _frequencies(self.base, self.size)

    def factor(self) -> float:
        return self.given.number("factor", self.max_positions / self.original)


def _frequencies(base: float, size: int) -> tuple[float, ...]:
    return tuple(base ** (-even / size) for even in range(0, size, 2))


def _plain(asked: _Asked) -> Rope:
    return Rope(frequencies=asked.frequencies)


def _linear(asked: _Asked) -> Rope:
    factor = asked.given.number("factor")
    return Rope(frequencies=tuple(f / factor for f in asked.frequencies))


def _dynamic(asked: _Asked) -> Rope:
    growing = Dynamic(base=asked.base, factor=asked.given.number("factor"), num_features=asked.size)
    return Rope(
        frequencies=asked.frequencies,
        original_length=asked.max_positions,
        dynamic=growing,
        reach=round(growing.factor * asked.max_positions),
    )


def _yarn(asked: _Asked) -> Rope:
    """arXiv:2309.00071, section 3.2: high frequencies stay, low ones are divided, a ramp between.

    The ramp runs over the features that turn beta_fast to beta_slow times in the original length.
    """
    given, size, factor = asked.given, asked.size, asked.factor()

    def feature(num_turns: float) -> float:
        wavelengths = asked.original / (num_turns * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(asked.base))

    low = feature(given.number("beta_fast", 32.0))
    high = feature(given.number("beta_slow", 1.0))
    if given.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low if high != low else 0.001
    mixed = []
    for pair, frequency in enumerate(asked.frequencies):
        divided = min(1.0, max(0.0, (pair - low) / width))
        mixed.append(frequency / factor * divided + frequency * (1 - divided))
    above, below = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    magnitude = _mscale(factor, 1.0)
    if above and below:
        magnitude = _mscale(factor, above) / _mscale(factor, below)
    return Rope(
        frequencies=tuple(mixed),
        magnitude=given.number("attention_factor", magnitude),
        reach=round(factor * asked.original),
    )


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def score_scale(config: Config) -> float:
    """What latent attention multiplies its scale by where a rope is stretched (mscale_all_dim).

    Sines and cosines can't carry it, since but a part of each head turns: arXiv:2405.04434,
    section 3.1.3, and the code that DeepSeek published with its models.
    """
    given = rope_fields(config)
    weight = given.number("mscale_all_dim", 0.0)
    if not weight or rope_type(given) == "default":
        return 1.0
    return _mscale(given.number("factor"), weight) ** 2


def _longrope(asked: _Asked) -> Rope:
    """arXiv:2402.13753: a divisor of its own for each frequency, other ones in long rows."""
    given, factor = asked.given, asked.factor()
    short = given.numbers("short_factor", len(asked.frequencies))
    long = given.numbers("long_factor", len(asked.frequencies))
    magnitude = 1.0
    if factor > 1:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(asked.original))
    return Rope(
        frequencies=_divided(asked.frequencies, short),
        long_frequencies=_divided(asked.frequencies, long),
        original_length=asked.original,
        magnitude=given.number("attention_factor", magnitude),
    )


def _divided(frequencies: Sequence[float], factors: Sequence[float]) -> tuple[float, ...]:
    return tuple(f / factor for f, factor in zip(frequencies, factors, strict=True))


def _llama3(asked: _Asked) -> Rope:
    """Long waves are stretched, short ones stay, those between are mixed (Llama 3.1)."""
    given, factor = asked.given, asked.given.number("factor")
    low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
    bands = []
    for frequency in asked.frequencies:
        num_waves = asked.original * frequency / (2 * math.pi)
        stays = min(1.0, max(0.0, (num_waves - low) / (high - low)))
        bands.append((1 - stays) * frequency / factor + stays * frequency)
    return Rope(frequencies=tuple(bands))


_SCALINGS: Mapping[str, Callable[[_Asked], Rope]] = {
    "default": _plain,
    "mrope": _plain,  # of three positions, which are one and the same in text
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # what Phi-3's first configs called it
    "llama3": _llama3,
}

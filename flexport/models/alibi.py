"""ALiBi: how fast each head's scores fall with the distance of a key (arXiv:2108.12409)."""

from __future__ import annotations

__all__ = ["alibi_slopes"]


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> tuple[float, ...]:
    """What a head's scores lose a token of distance, one a head.

    2**n heads have the geometric sequence of section 3, down to 2**-bias_max. For other counts
    it is that of the next lower power of two, and then every other one of the next higher power,
    which is what the paper's code does.
    """
    power = 1 << (num_heads.bit_length() - 1)
    between = _sequence(2 * power, bias_max)[::2]
    return _sequence(power, bias_max) + between[: num_heads - power]


def _sequence(length: int, bias_max: float) -> tuple[float, ...]:
    return tuple(2.0 ** (-bias_max * place / length) for place in range(1, length + 1))

"""Reads a Hugging Face config's fields and refuses, by name, what can't be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from flexport.errors import UnsupportedModel

__all__ = ["Config"]

Value = TypeVar("Value")


class Config:
    """A config dict whose fields are checked as they are read.

    An absent field has the family's default, or else the call's. A null counts as absent but where
    it says that there is none: of tokens, and of what is read with "or_none".
    """

    def __init__(
        self,
        family: str,
        values: Mapping[str, Any],
        defaults: Mapping[str, Any] | None = None,
        *,
        also: Mapping[str, str] | None = None,
    ) -> None:
        """`defaults` are those of the family's config class.

        `also` has other names of fields, each with the one by which it is asked for here; who is
        refused is told the name that the config has. Raises UnsupportedModel where it has both and
        they differ.
        """
        self.family = family
        self._values = dict(values)
        self._defaults = defaults or {}
        self._told: dict[str, str] = {}
        for other, name in (also or {}).items():
            value = values.get(other)
            if value is None:
                continue
            if values.get(name) not in (None, value):
                raise self.unsupported(
                    f"{name} is {values[name]!r} and {other} is {value!r}",
                    "what is one and the same",
                )
            self._values[name] = value
            self._told[name] = other

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self._values.get(name) is not None

    def count(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number >= least; a field without a default has to be there."""
        value = self._get(name, default)
        if not _is_int(value) or value < least:
            raise self._refused(name, f"a whole number >= {least}")
        return int(value)

    def count_or_none(self, name: str, default: int | None = None) -> int | None:
        """The same; None if the field is null, or absent without a default."""
        return None if self._or_null(name, default) is None else self.count(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number; a field without a default has to be there."""
        value = self._get(name, default)
        if not _is_number(value):
            raise self._refused(name, "a number")
        return float(value)

    def number_or_none(self, name: str, default: float | None = None) -> float | None:
        """The same; None if the field is null, or absent without a default."""
        return None if self._or_null(name, default) is None else self.number(name, default)

    def numbers(self, name: str, how_many: int) -> tuple[float, ...]:
        """A list of so many numbers."""
        value = self._get(name, None)
        if not isinstance(value, list) or len(value) != how_many or not all(map(_is_number, value)):
            raise self._refused(name, f"a list of {how_many} numbers")
        return tuple(map(float, value))

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._refused(name, "true or false")
        return value

    def word(self, name: str, default: str) -> str:
        """A string."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self._refused(name, "a string")
        return value

    def words(self, name: str, how_many: int, known: Sequence[str]) -> tuple[str, ...] | None:
        """One of the known words for each of so many layers; None if the field is absent."""
        value = self._get(name, None)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != how_many or not set(value) <= set(known):
            raise self._refused(name, f"a list of {how_many}, each one of {', '.join(known)}")
        return tuple(value)

    def ints(self, name: str, default: Sequence[int]) -> tuple[int, ...]:
        """A list of whole numbers."""
        value = self._get(name, list(default))
        if not isinstance(value, list) or not all(map(_is_int, value)):
            raise self._refused(name, "a list of whole numbers")
        return tuple(value)

    def choice(self, name: str, default: str, known: Mapping[str, Value]) -> Value:
        """What `known` has for a word."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._refused(name, f"one of {', '.join(known)}")
        return known[value]

    def token_id(self, name: str, default: int | None) -> int | None:
        """A token id, `default` where the field is absent, None where it is null."""
        value = self._or_null(name, default)
        if value is None:
            return None
        if not _is_int(value) or value < 0:
            raise self._refused(name, "a token id")
        return int(value)

    def token_ids(self, name: str, default: int | None) -> tuple[int, ...]:
        """Token ids of a field that holds one, a list of them, or null."""
        value = self._or_null(name, default)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(item) and item >= 0 for item in listed):
            raise self._refused(name, "a token id or a list of them")
        return tuple(listed)

    def mapping(self, name: str) -> Mapping[str, Any]:
        """An object; an empty one if the field is absent."""
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise self._refused(name, "an object")
        return value

    def head_dim(self, hidden_size: int, num_heads: int) -> int:
        """Features of a head where the heads share the hidden features out among them."""
        if hidden_size % num_heads:
            raise self.unsupported(
                f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}",
                "one that is",
            )
        self.refuse_unless("head_dim", hidden_size // num_heads)
        return hidden_size // num_heads

    def kv_heads(self, name: str, default: int, num_heads: int) -> int:
        """Key/value heads, each for as many of the query heads as any other."""
        value = self.count(name, default)
        if num_heads % value:
            raise self.unsupported(f"{name} is {value}", f"a divisor of the {num_heads} heads")
        return value

    def within(self, label: str, values: Mapping[str, Any]) -> Config:
        """The fields of an object in the config."""
        return Config(f"{self.family} {label}", values)

    def refuse_unless(self, name: str, required: object) -> None:
        """Raise if the field is there and is not `required`."""
        if self._get(name, required) != required:
            raise self._refused(name, repr(required))

    def unsupported(self, found: str, known: str) -> UnsupportedModel:
        """The error for what was found, and what can be run instead."""
        return UnsupportedModel(f"{self.family} config: {found}; flexport can run {known}")

    def _get(self, name: str, default: object) -> Any:
        for values in (self._values, self._defaults):
            if values.get(name) is not None:
                return values[name]
        return default

    def _or_null(self, name: str, default: object) -> Any:
        return self._values.get(name, self._defaults.get(name, default))

    def _refused(self, name: str, known: str) -> UnsupportedModel:
        found = f"{self._told.get(name, name)} is {self._values.get(name)!r}"
        return self.unsupported(found, known)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30

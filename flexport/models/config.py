"""Reads a Hugging Face config's fields and refuses, by name, what can't be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from flexport.errors import UnsupportedModel

__all__ = ["Config"]

Value = TypeVar("Value")


class Config:
    """A config dict whose fields are checked as they are read. A null counts as absent."""

    def __init__(self, family: str, values: Mapping[str, Any]) -> None:
        self._family = family
        self._values = values

    def count(self, name: str, default: int) -> int:
        """A whole number >= 1."""
        value = self._get(name, default)
        if not _is_int(value) or value < 1:
            raise self._unsupported(name, "a whole number >= 1")
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._unsupported(name, "true or false")
        return value

    def choice(self, name: str, default: str, known: Mapping[str, Value]) -> Value:
        """What `known` has for a word."""
        value = self._get(name, default)
        if not isinstance(value, str) or value not in known:
            raise self._unsupported(name, f"one of {', '.join(known)}")
        return known[value]

    def token_id(self, name: str, default: int) -> int | None:
        """A token id, `default` where the field is absent, None where it is null."""
        value = self._values.get(name, default)
        if value is None:
            return None
        if not _is_int(value) or value < 0:
            raise self._unsupported(name, "a token id")
        return int(value)

    def token_ids(self, name: str, default: int | None) -> tuple[int, ...]:
        """Token ids of a field that holds one, a list of them, or null."""
        value = self._values.get(name, default)
        listed = value if isinstance(value, list) else [] if value is None else [value]
        if not all(_is_int(item) and item >= 0 for item in listed):
            raise self._unsupported(name, "a token id or a list of them")
        return tuple(listed)

    def refuse_unless(self, name: str, required: object) -> None:
        """Raise if the field is there and is not `required`."""
        if self._get(name, required) != required:
            raise self._unsupported(name, repr(required))

    def _get(self, name: str, default: object) -> Any:
        value = self._values.get(name)
        return default if value is None else value

    def _unsupported(self, name: str, known: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"{self._family} config: {name} is {self._values.get(name)!r}; flexport can run {known}"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

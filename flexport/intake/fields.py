"""What one field of a row may hold: types checked by name, nothing converted silently.

A field with the value null counts as absent, as in OpenAI's API and in exported data frames.
Ranges are not checked here: they depend on the command line's values (`encode` merges them).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from flexport.errors import RowError

__all__ = [
    "SAMPLING_FIELDS",
    "chat_messages",
    "is_neutral",
    "sampling_overrides",
    "text",
    "token_ids",
]

NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (False,),
    "presence_penalty": (0, 0.0),
    "frequency_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
}
"""Fields of other engines that flexport has no equal of, with the values that ask for nothing."""


def text(name: str, value: Any) -> str:
    """`value` if it is text that can be encoded as UTF-8."""
    if not isinstance(value, str):
        raise _wrong_type(name, "a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(
            "invalid_value", f"{name} holds half of a surrogate pair, which is no character"
        ) from None
    return value


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    """`value` if it is a list of whole numbers >= 0."""
    if not isinstance(value, list) or not all(_is_int(item) and item >= 0 for item in value):
        raise _wrong_type(name, "a list of token ids (whole numbers >= 0)", value)
    return tuple(value)


def chat_messages(name: str, value: Any) -> tuple[Mapping[str, Any], ...]:
    """The messages of a conversation, the text parts of each joined to one string."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _wrong_type(name, "a list of objects with role and content", value)
    if not value:
        raise RowError("empty_prompt", f"{name} is empty; give at least one message")
    return tuple(_message(f"{name}[{index}]", message) for index, message in enumerate(value))


def sampling_overrides(source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of SamplingParams that `source` sets, by name."""
    return {
        name: check(name, source[name])
        for name, check in SAMPLING_FIELDS.items()
        if source.get(name) is not None
    }


def is_neutral(name: str, value: Any) -> bool:
    """Whether ignoring the field can't change the answer."""
    # True == 1 in Python, but "logprobs": 0 asks for something that "logprobs": false does not.
    return value is None or any(
        type(value) is type(harmless) and value == harmless
        for harmless in NEUTRAL_VALUES.get(name, ())
    )


def _message(name: str, message: dict[str, Any]) -> Mapping[str, Any]:
    text(f"{name}.role", message.get("role"))
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message  # a call of a tool, as told by an earlier turn, has no text
    if isinstance(content, list):
        content = "".join(
            _text_part(f"{name}.content[{index}]", part) for index, part in enumerate(content)
        )
    return {**message, "content": text(f"{name}.content", content)}


def _text_part(name: str, part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text":
        raise RowError(
            "unsupported_field",
            f"{name} must be a part of type 'text', got {_shown(kind or part)}; flexport reads text only",
        )
    return text(f"{name}.text", part.get("text"))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(name: str, value: Any) -> int:
    if not _is_int(value):
        raise _wrong_type(name, "a whole number", value)
    return int(value)


def _seed(name: str, value: Any) -> int:
    seed = _whole(name, value)
    if not -(1 << 63) <= seed < 1 << 63:
        raise RowError("invalid_value", f"{name} must fit in 64 bits, got {_shown(seed)}")
    return seed


def _number(name: str, value: Any) -> float:
    if not _is_int(value) and not isinstance(value, float):
        raise _wrong_type(name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise RowError("invalid_value", f"{name} is too large: {_shown(value)}") from None


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong_type(name, "true or false", value)
    return value


def _top_k(name: str, value: Any) -> int:
    return _whole(name, 0 if value == -1 else value)  # vLLM's users write -1 for off


def _stop(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        raise _wrong_type(name, "a string or a list of strings", value)
    return tuple(text(name, item) for item in value)


def _wrong_type(name: str, wanted: str, value: Any) -> RowError:
    return RowError("invalid_type", f"{name} must be {wanted}, got {_shown(value)}")


def _shown(value: Any) -> str:
    """`value` as JSON, short enough for a message."""
    try:
        shown = json.dumps(value)
    except ValueError:  # a whole number with more digits than Python prints
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:60]}…"


SAMPLING_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "max_tokens": _whole,
    "min_tokens": _whole,
    "temperature": _number,
    "top_p": _number,
    "top_k": _top_k,
    "min_p": _number,
    "repetition_penalty": _number,
    "stop": _stop,
    "stop_token_ids": token_ids,
    "ignore_eos": _flag,
    "seed": _seed,
}
"""The fields of SamplingParams, each with the check that its value must pass."""

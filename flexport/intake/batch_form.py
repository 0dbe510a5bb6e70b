"""Rows in the form of OpenAI's batch file: one HTTP request to a completions endpoint a line.

Every field of the body is honoured, known to be without effect on the answer, or refused by name.
`model` has no effect: a job runs on one model, the one it was started with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.errors import RowError
from flexport.intake.fields import (
    SAMPLING_FIELDS,
    chat_messages,
    is_neutral,
    sampling_overrides,
    text,
    token_ids,
)
from flexport.intake.rows import Chat
from flexport.records import RowForm

__all__ = ["form_of", "looks_like_batch", "overrides_of", "prompt_of"]

_FORMS: dict[str, RowForm] = {"/v1/completions": "completions", "/v1/chat/completions": "chat"}

_WITHOUT_EFFECT = frozenset({
    "metadata",
    "model",
    "parallel_tool_calls",
    "priority",
    "prompt_cache_key",
    "prompt_cache_retention",
    "request_id",
    "safety_identifier",
    "service_tier",
    "store",
    "stream_options",
    "user",
})  # fmt: skip


def looks_like_batch(row: Mapping[str, Any]) -> bool:
    """Whether the row means to be one of OpenAI's form, well made or not."""
    return "custom_id" in row or "body" in row or "url" in row


def form_of(row: Mapping[str, Any]) -> RowForm:
    """The form of the answer; raises RowError for another method or endpoint."""
    if row.get("method", "POST") != "POST":
        raise RowError("invalid_value", f"method must be 'POST', got {row['method']!r}")
    url = row.get("url")
    form = _FORMS.get(url) if isinstance(url, str) else None
    if form is None:
        raise RowError(
            "unsupported_url", f"url {url!r} is not supported; supported: {', '.join(_FORMS)}"
        )
    return form


def prompt_of(form: RowForm, body: Mapping[str, Any]) -> str | tuple[int, ...] | Chat:
    """The prompt that the body asks to continue."""
    if form == "chat":
        return Chat(messages=chat_messages("messages", _required(body, "messages")))
    prompt = _required(body, "prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) != 1:
            raise RowError(
                "invalid_value", f"prompt holds {len(prompt)} prompts; give one prompt a row"
            )
        prompt = prompt[0]
    return token_ids("prompt", prompt) if isinstance(prompt, list) else text("prompt", prompt)


def overrides_of(form: RowForm, body: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling fields that the body sets; raises RowError for one that can't be honoured."""
    own = {"messages", "max_completion_tokens"} if form == "chat" else {"prompt"}
    for name, value in body.items():
        if name in own or name in SAMPLING_FIELDS or name in _WITHOUT_EFFECT:
            continue
        if not is_neutral(name, value):
            raise RowError(
                "unsupported_field",
                f"{name} is not supported, and ignoring it would change the answer",
            )
    newer, older = body.get("max_completion_tokens"), body.get("max_tokens")
    if form != "chat" or newer is None:
        return sampling_overrides(body)
    if older is not None and older != newer:
        raise RowError(
            "invalid_value",
            f"max_tokens {older!r} and max_completion_tokens {newer!r} differ; give one of them",
        )
    return sampling_overrides({**body, "max_tokens": newer})


def _required(body: Mapping[str, Any], name: str) -> Any:
    value = body.get(name)
    if value is None:
        raise RowError("missing_prompt", f"the body has no {name!r}")
    return value

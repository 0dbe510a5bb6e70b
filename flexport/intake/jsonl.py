"""JSONL in: a stream of bytes becomes a stream of rows, one line in memory at a time.

Nothing a line holds stops the job: what can't be run becomes a `BadRow` that says why. The only
thing kept about earlier lines is 16 bytes of digest an id, to find ids that are used twice.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from typing import Any, BinaryIO

from flexport.errors import RowError
from flexport.intake import batch_form
from flexport.intake.fields import (
    NEUTRAL_VALUES,
    SAMPLING_FIELDS,
    chat_messages,
    is_neutral,
    sampling_overrides,
    text,
    token_ids,
)
from flexport.intake.rows import BadRow, Chat, Row
from flexport.records import RowForm

__all__ = ["read_rows"]

MAX_LINE_BYTES = 256 << 20
"""Bounds the reader's memory; a prompt of a million tokens takes about 5 MB."""

_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_rows(stream: BinaryIO, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[Row | BadRow]:
    """The rows of `stream` in order. Blank lines are skipped, but counted as lines."""
    seen: set[bytes] = set()
    for line, raw in _lines(stream, max_line_bytes):
        row = _read_row(raw, line, max_line_bytes)
        digest = blake2b(row.key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen and isinstance(row, Row):
            yield BadRow(
                id=row.id,
                line=line,
                form=row.form,
                model=row.model,
                code="duplicate_id",
                message=f"id {row.id!r} was used by an earlier row; every id must be unique",
            )
        else:
            yield row
        seen.add(digest)


def _lines(stream: BinaryIO, max_line_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of an overlong one only its first bytes."""
    line = 0
    while raw := stream.readline(max_line_bytes + 1):
        line += 1
        rest = raw
        while len(rest) > max_line_bytes and not rest.endswith(b"\n"):
            rest = stream.readline(max_line_bytes + 1)
        if line == 1:
            raw = raw.removeprefix(_BYTE_ORDER_MARK)
        if raw.strip():
            yield line, raw


def _read_row(raw: bytes, line: int, max_line_bytes: int) -> Row | BadRow:
    """The row of one line. Fills in what is known step by step, for the error row's sake."""
    row_id: str | int = str(line)
    form: RowForm = "simple"
    model = None
    try:
        fields = _object(raw, max_line_bytes)
        if not batch_form.looks_like_batch(fields):
            row_id = _id_of(fields, "id", default=row_id)
            return Row(
                id=row_id,
                line=line,
                form=form,
                prompt=_not_empty(_simple_prompt(fields)),
                overrides=_simple_overrides(fields),
            )
        form = "completions"  # until the url is known: the failure takes the batch form
        row_id = _id_of(fields, "custom_id", default=row_id)
        body = fields.get("body")
        if isinstance(body, dict) and isinstance(body.get("model"), str):
            model = body["model"]
        form = batch_form.form_of(fields)
        if not isinstance(body, dict):
            raise RowError("invalid_type", "body must be an object: the request to the endpoint")
        return Row(
            id=row_id,
            line=line,
            form=form,
            prompt=_not_empty(batch_form.prompt_of(form, body)),
            overrides=batch_form.overrides_of(form, body),
            model=model,
        )
    except RowError as error:
        return BadRow(
            id=row_id, line=line, form=form, code=error.code, message=str(error), model=model
        )


def _object(raw: bytes, max_line_bytes: int) -> dict[str, Any]:
    if len(raw) > max_line_bytes:
        raise RowError("line_too_long", f"the line has more than {max_line_bytes} bytes")
    try:
        fields = json.loads(raw.decode())
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"the line is not UTF-8: {error.reason}") from error
    # Besides bad syntax: a number of thousands of digits, and brackets nested that deep.
    except (ValueError, RecursionError) as error:
        raise RowError("invalid_json", f"the line is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise RowError("not_an_object", f"the line must be a JSON object, got {raw[:40]!r}")
    return fields


def _id_of(fields: Mapping[str, Any], name: str, default: str | int) -> str | int:
    row_id = fields.get(name)
    if row_id is None:
        return default
    if isinstance(row_id, bool) or not isinstance(row_id, (str, int)):
        raise RowError("invalid_type", f"{name} must be a string or a whole number")
    return row_id


def _simple_prompt(fields: Mapping[str, Any]) -> str | tuple[int, ...] | Chat:
    given = [name for name in _PROMPT_FIELDS if fields.get(name) is not None]
    if not given:
        raise RowError("missing_prompt", f"the row has none of {', '.join(_PROMPT_FIELDS)}")
    if len(given) > 1:
        raise RowError("invalid_value", f"the row has {' and '.join(given)}; give one of them")
    value = fields[given[0]]
    match given[0]:
        case "prompt":
            return text("prompt", value)
        case "prompt_token_ids":
            return token_ids("prompt_token_ids", value)
        case _:
            return Chat(messages=chat_messages("messages", value))


def _simple_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The row's sampling fields. Fields of the user's own are fine, misspelt ones are not."""
    known = (*SAMPLING_FIELDS, *_PROMPT_FIELDS, "id")
    for name, value in fields.items():
        if name in known or is_neutral(name, value):
            continue
        if name in NEUTRAL_VALUES:
            raise RowError(
                "unsupported_field",
                f"{name} is not supported, and ignoring it would change the answer",
            )
        near = difflib.get_close_matches(
            name.lower(), (*known, "max_completion_tokens", "max_new_tokens"), n=1, cutoff=0.86
        )
        if near:
            meant = near[0] if near[0] in known else "max_tokens"
            raise RowError(
                "unsupported_field", f"{name!r} is not a field of a row; is {meant!r} meant?"
            )
    return sampling_overrides(fields)


def _not_empty(prompt: str | tuple[int, ...] | Chat) -> str | tuple[int, ...] | Chat:
    if not prompt:
        raise RowError("empty_prompt", "the prompt is empty; there is nothing to continue")
    return prompt

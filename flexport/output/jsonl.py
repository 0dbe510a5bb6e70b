"""JSONL out: what a completion or a failure looks like as one object of an output file.

Two forms: flexport's own, and that of OpenAI's batch output files, which readers made for
`vllm run-batch` parse as well. A failure carries its line number in both, so that a resumed job
knows which lines it has already refused.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from flexport.records import Completion, RowForm

__all__ = ["completion_row", "failure_row", "to_line"]

_BAD_REQUEST = 400


def completion_row(
    form: RowForm, row_id: str | int, completion: Completion, *, model: str
) -> dict[str, Any]:
    """The output row of a finished request; `model` is named in the OpenAI forms."""
    num_prompt, num_generated = len(completion.request.token_ids), len(completion.token_ids)
    if form == "simple":
        return {
            "id": row_id,
            "text": completion.text,
            "token_ids": list(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
        }
    if form == "chat":
        prefix, kind = "chatcmpl", "chat.completion"
        content: dict[str, Any] = {"message": {"role": "assistant", "content": completion.text}}
    else:
        prefix, kind = "cmpl", "text_completion"
        content = {"text": completion.text}
    name = uuid.uuid4().hex
    body = {
        "id": f"{prefix}-{name}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "choices": [
            {
                "index": 0,
                **content,
                "logprobs": None,
                "finish_reason": completion.finish_reason,
            }
        ],
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        },
    }
    return {
        "id": f"flexport-{name}",
        "custom_id": row_id,
        "response": {"status_code": 200, "request_id": f"flexport-batch-{name}", "body": body},
        "error": None,
    }


def failure_row(
    form: RowForm, row_id: str | int, *, line: int, code: str, message: str
) -> dict[str, Any]:
    """The output row of an input line that could not be run."""
    if form == "simple":
        return {"id": row_id, "line": line, "error": {"code": code, "message": message}}
    name = uuid.uuid4().hex
    return {
        "id": f"flexport-{name}",
        "custom_id": row_id,
        "response": {
            "status_code": _BAD_REQUEST,
            "request_id": f"flexport-batch-{name}",
            "body": None,
        },
        "error": {"code": code, "message": message, "line": line},
    }


def to_line(row: Mapping[str, Any]) -> bytes:
    """The row as one line of a file, its newline included.

    Pure ASCII: readers disagree about which other characters end a line (U+2028, U+0085), and a
    model may write any of them.
    """
    return json.dumps(row, allow_nan=False).encode("ascii") + b"\n"

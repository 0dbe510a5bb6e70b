from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.intake.jsonl import read_rows
from flexport.intake.rows import BadRow, Chat, Row


def rows_of(*lines: Any) -> list[Row | BadRow]:
    """The rows of lines given as bytes or as what they should hold."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    return list(read_rows(io.BytesIO(b"\n".join(raw))))


def good(line: Any) -> Row:
    (row,) = rows_of(line)
    assert isinstance(row, Row), row
    return row


def bad(line: Any) -> BadRow:
    (row,) = rows_of(line)
    assert isinstance(row, BadRow), row
    return row


def batch_line(body: Any, url: Any = "/v1/completions", **fields: Any) -> dict[str, Any]:
    return {"custom_id": "c", "method": "POST", "url": url, "body": body, **fields}


def chat_line(**body: Any) -> dict[str, Any]:
    body.setdefault("messages", [{"role": "user", "content": "hi"}])
    return batch_line(body, url="/v1/chat/completions")


# --- lines -----------------------------------------------------------------------------------


def test_blank_lines_are_skipped_and_still_counted() -> None:
    rows = rows_of({"prompt": "a"}, b"", b"  \t\r", {"prompt": "b"})

    assert [(row.id, row.line) for row in rows] == [("1", 1), ("4", 4)]


def test_a_byte_order_mark_and_carriage_returns_are_not_part_of_a_row() -> None:
    rows = rows_of(b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')

    assert [row.prompt for row in rows if isinstance(row, Row)] == ["a", "b"]


def test_lines_are_read_one_at_a_time() -> None:
    class Endless(io.RawIOBase):
        num_lines = 0

        def readline(self, size: int | None = -1, /) -> bytes:
            self.num_lines += 1
            return b'{"prompt": "a"}\n'

    stream = Endless()
    rows: Iterator[Row | BadRow] = read_rows(stream)  # type: ignore[arg-type]

    first = [next(rows) for _ in range(3)]

    assert [row.line for row in first] == [1, 2, 3]
    assert stream.num_lines == 3


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b'{"prompt": "a"', "invalid_json"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"prompt": "\xff"}', "invalid_utf8"),
        (b'["prompt"]', "not_an_object"),
        (b"null", "not_an_object"),
    ],
)
def test_an_unreadable_line_is_one_error_row_named_after_its_line(line: bytes, code: str) -> None:
    rows = rows_of({"prompt": "a"}, line, {"prompt": "b"})

    assert [type(row) for row in rows] == [Row, BadRow, Row]
    refused = rows[1]
    assert isinstance(refused, BadRow)
    assert (refused.id, refused.line, refused.code) == ("2", 2, code)


def test_an_overlong_line_is_one_error_row_and_not_kept_in_memory() -> None:
    stream = io.BytesIO(b'{"prompt": "' + b"x" * 1000 + b'"}\n{"prompt": "a"}\n')

    rows = list(read_rows(stream, max_line_bytes=100))

    assert [(row.line, getattr(row, "code", None)) for row in rows] == [
        (1, "line_too_long"),
        (2, None),
    ]


lines_of_bytes = st.binary(max_size=40).filter(
    lambda raw: b"\n" not in raw and not raw.startswith(b"\xef\xbb\xbf")
)


@given(st.lists(lines_of_bytes))
def test_no_bytes_stop_the_reader_and_every_line_has_its_row(lines: list[bytes]) -> None:
    rows = rows_of(*lines)

    expected = [number for number, raw in enumerate(lines, start=1) if raw.strip()]
    assert [row.line for row in rows] == expected


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
field_names = st.sampled_from(
    "id prompt prompt_token_ids messages max_tokens temperature stop seed".split()
    + "custom_id method url body n logprobs role content".split()
)


@given(st.dictionaries(field_names, json_values | st.dictionaries(field_names, json_values)))
def test_any_object_is_a_row_or_an_error_row(fields: dict[str, Any]) -> None:
    (row,) = rows_of(fields)

    assert isinstance(row, (Row, BadRow))


# --- ids -------------------------------------------------------------------------------------


def test_an_id_comes_back_as_it_was_written() -> None:
    rows = rows_of({"id": 7, "prompt": "a"}, {"id": "x", "prompt": "a"}, {"prompt": "a"})

    assert [row.id for row in rows] == [7, "x", "3"]
    assert [row.key for row in rows] == ["7", "x", "3"]


def test_a_second_use_of_an_id_is_an_error_row_in_the_form_of_its_row() -> None:
    rows = rows_of({"id": "c", "prompt": "a"}, chat_line(), {"id": "d", "prompt": "a"})

    assert [getattr(row, "code", None) for row in rows] == [None, "duplicate_id", None]
    assert [row.form for row in rows] == ["simple", "chat", "simple"]


def test_seven_and_the_text_seven_are_one_id() -> None:
    rows = rows_of({"id": 7, "prompt": "a"}, {"id": "7", "prompt": "a"})

    assert isinstance(rows[1], BadRow)


@pytest.mark.parametrize("row_id", [True, 1.5, ["a"], {}])
def test_an_id_that_is_no_name_is_refused(row_id: Any) -> None:
    assert bad({"id": row_id, "prompt": "a"}).code == "invalid_type"


# --- simple rows -----------------------------------------------------------------------------


def test_a_row_may_set_every_sampling_field() -> None:
    fields = {
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 1,
        "top_p": 0.5,
        "top_k": -1,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "stop": "x",
        "stop_token_ids": [3],
        "ignore_eos": True,
        "seed": 9,
    }

    row = good({"prompt": "a", **fields})

    changed = {"temperature": 1.0, "top_k": 0, "stop": ("x",), "stop_token_ids": (3,)}
    assert row.overrides == {**fields, **changed}


def test_null_means_absent() -> None:
    assert good({"id": None, "prompt": "a", "max_tokens": None, "messages": None}).overrides == {}


def test_prompts_come_as_text_tokens_or_messages() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]

    prompts = [
        good({"prompt": "a"}).prompt,
        good({"prompt_token_ids": [1, 2]}).prompt,
        good({"messages": messages}).prompt,
    ]

    assert prompts == ["a", (1, 2), Chat(messages=({"role": "user", "content": "hi"},))]


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({}, "missing_prompt"),
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt_token_ids": []}, "empty_prompt"),
        ({"messages": []}, "empty_prompt"),
        ({"prompt": 5}, "invalid_type"),
        ({"prompt": "\ud800"}, "invalid_value"),
        ({"prompt_token_ids": [1, -1]}, "invalid_type"),
        ({"prompt_token_ids": [True]}, "invalid_type"),
        ({"prompt": "a", "prompt_token_ids": [1]}, "invalid_value"),
        ({"messages": ["hi"]}, "invalid_type"),
        ({"messages": [{"content": "hi"}]}, "invalid_type"),
        ({"messages": [{"role": "user"}]}, "invalid_type"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "unsupported_field"),
        ({"prompt": "a", "max_tokens": "5"}, "invalid_type"),
        ({"prompt": "a", "max_tokens": 5.0}, "invalid_type"),
        ({"prompt": "a", "max_tokens": True}, "invalid_type"),
        ({"prompt": "a", "temperature": "hot"}, "invalid_type"),
        ({"prompt": "a", "temperature": 10**400}, "invalid_value"),
        ({"prompt": "a", "stop": [1]}, "invalid_type"),
        ({"prompt": "a", "ignore_eos": 1}, "invalid_type"),
        ({"prompt": "a", "seed": 1 << 63}, "invalid_value"),
    ],
)
def test_a_row_that_cannot_be_run_says_why(fields: dict[str, Any], code: str) -> None:
    assert bad({"id": "a", **fields}).code == code


def test_a_row_may_have_columns_of_the_users_own() -> None:
    good({"prompt": "a", "label": 3, "source": "x", "prompt_id": 7, "n": 1, "logprobs": None})


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("max_token", 5, "max_tokens"),
        ("temprature", 0.5, "temperature"),
        ("max_new_tokens", 5, "max_tokens"),
        ("logprobs", 0, "logprobs"),
        ("n", 2, "n is"),
        ("presence_penalty", 0.5, "presence_penalty"),
    ],
)
def test_a_misspelt_or_unsupported_field_is_refused_by_name(
    name: str, value: Any, told: str
) -> None:
    refused = bad({"prompt": "a", name: value})

    assert refused.code == "unsupported_field"
    assert told in refused.message


# --- OpenAI's rows ---------------------------------------------------------------------------


def test_a_completions_row() -> None:
    row = good(batch_line({"model": "m", "prompt": "a", "max_tokens": 3, "user": "u"}))

    assert (row.id, row.form, row.prompt, row.model) == ("c", "completions", "a", "m")
    assert row.overrides == {"max_tokens": 3}


def test_a_chat_row() -> None:
    row = good(chat_line(max_completion_tokens=3, stop=["a", "b"], stream=False, n=1))

    assert row.form == "chat"
    assert row.prompt == Chat(messages=({"role": "user", "content": "hi"},))
    assert row.overrides == {"max_tokens": 3, "stop": ("a", "b")}


@pytest.mark.parametrize("prompt", [["a"], [[1, 2]], [1, 2]])
def test_a_completions_prompt_may_be_tokens_or_a_list_of_one(prompt: Any) -> None:
    assert good(batch_line({"prompt": prompt})).prompt in ("a", (1, 2))


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (batch_line({"prompt": "a"}, method="GET"), "invalid_value"),
        (batch_line({"prompt": "a"}, url="/v1/embeddings"), "unsupported_url"),
        (batch_line({"prompt": "a"}, url=["/v1/completions"]), "unsupported_url"),
        (batch_line("a"), "invalid_type"),
        (batch_line({}), "missing_prompt"),
        (batch_line({"prompt": ""}), "empty_prompt"),
        (batch_line({"prompt": ["a", "b"]}), "invalid_value"),
        (batch_line({"prompt": "a", "max_completion_tokens": 3}), "unsupported_field"),
        (chat_line(messages=None), "missing_prompt"),
        (chat_line(max_tokens=3, max_completion_tokens=4), "invalid_value"),
        (chat_line(stream=True), "unsupported_field"),
        (chat_line(n=2), "unsupported_field"),
        (chat_line(logprobs=True), "unsupported_field"),
        (chat_line(response_format={"type": "json_object"}), "unsupported_field"),
        (chat_line(tools=[{"type": "function"}]), "unsupported_field"),
        (chat_line(some_new_field=1), "unsupported_field"),
    ],
)
def test_a_batch_row_that_cannot_be_honoured_is_refused_in_its_own_form(
    line: dict[str, Any], code: str
) -> None:
    refused = bad(line)

    assert (refused.id, refused.code) == ("c", code)
    assert refused.form in ("completions", "chat")


def test_harmless_values_of_unsupported_fields_are_accepted() -> None:
    harmless = {"logprobs": False, "tools": [], "frequency_penalty": 0, "logit_bias": {}}

    assert good(chat_line(**harmless, metadata={"k": "v"}, reasoning_effort=None)).overrides == {}

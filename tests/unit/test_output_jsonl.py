from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.output.jsonl import completion_row, failure_row, to_line
from flexport.records import Completion, Request, RowForm, SamplingParams


def completion(text: str = "it") -> Completion:
    request = Request(request_id="a", token_ids=(1, 2, 3), sampling=SamplingParams())
    return Completion(request=request, token_ids=(4, 5), text=text, finish_reason="stop")


def test_a_simple_answer() -> None:
    assert completion_row("simple", 7, completion(), model="m") == {
        "id": 7,
        "text": "it",
        "token_ids": [4, 5],
        "finish_reason": "stop",
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }


def test_a_simple_failure() -> None:
    assert failure_row("simple", "a", line=17, code="c", message="m") == {
        "id": "a",
        "line": 17,
        "error": {"code": "c", "message": "m"},
    }


@pytest.mark.parametrize(
    ("form", "kind", "content"),
    [
        ("completions", "text_completion", {"text": "it"}),
        ("chat", "chat.completion", {"message": {"role": "assistant", "content": "it"}}),
    ],
)
def test_an_answer_in_openais_form(form: RowForm, kind: str, content: dict[str, object]) -> None:
    row = completion_row(form, "a", completion(), model="m")

    assert (row["custom_id"], row["error"]) == ("a", None)
    assert row["id"].startswith("flexport-")
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert (body["object"], body["model"]) == (kind, "m")
    assert body["choices"] == [{"index": 0, **content, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_failure_in_openais_form_has_status_400_and_no_body() -> None:
    row = failure_row("chat", "a", line=17, code="c", message="m")

    assert (row["custom_id"], row["error"]) == ("a", {"code": "c", "message": "m", "line": 17})
    assert (row["response"]["status_code"], row["response"]["body"]) == (400, None)


def test_two_answers_have_two_names() -> None:
    rows = [completion_row("chat", "a", completion(), model="m") for _ in range(2)]

    assert rows[0]["id"] != rows[1]["id"]


@given(st.text())
def test_a_row_is_one_line_for_every_reader_and_reads_back_the_same(text: str) -> None:
    row = completion_row("simple", "a", completion(text), model="m")

    line = to_line(row)

    assert len(line.decode().splitlines()) == 1
    assert json.loads(line) == row

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from flexport.errors import RowError
from flexport.intake.encode import Encoder
from flexport.intake.rows import Chat, Row
from flexport.records import SamplingParams
from flexport.testing.fake_engine import ByteTokenizer


def row(
    prompt: str | tuple[int, ...] | Chat = "abc", row_id: str | int = "r", **overrides: Any
) -> Row:
    return Row(id=row_id, line=1, form="simple", prompt=prompt, overrides=overrides)


def encoder(**settings: Any) -> Encoder:
    settings.setdefault("tokenizer", ByteTokenizer())
    settings.setdefault("defaults", SamplingParams(max_tokens=4))
    return Encoder(**settings)


def test_text_tokens_and_messages_become_token_ids() -> None:
    chat = Chat(messages=({"role": "user", "content": "x"},))

    requests = [encoder().encode(row(prompt)) for prompt in ("ab", (1, 2), chat)]

    assert [request.token_ids for request in requests] == [
        (97, 98),
        (1, 2),
        tuple(b"user: x\nassistant: "),
    ]
    assert [request.prompt for request in requests] == ["ab", None, None]


def test_a_rows_own_values_win_over_the_command_lines() -> None:
    defaults = SamplingParams(max_tokens=4, temperature=0.5, stop=("x",))

    sampling = encoder(defaults=defaults).encode(row(max_tokens=9, stop=("y",))).sampling

    assert (sampling.max_tokens, sampling.temperature, sampling.stop) == (9, 0.5, ("y",))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_a_sampling_value_out_of_range_is_the_rows_error(
    overrides: dict[str, Any], told: str
) -> None:
    with pytest.raises(RowError, match=told) as caught:
        encoder().encode(row(**overrides))

    assert caught.value.code == "invalid_value"


def test_prompt_and_answer_may_fill_the_context_exactly() -> None:
    request = encoder(max_positions=10).encode(row("a" * 6, max_tokens=4))

    assert request.num_tokens == 10


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "advice"),
    [
        (6, 5, "the largest max_tokens that would do is 4"),
        (10, 4, "shorten the prompt to at most 6 tokens"),
        (30, 30, "shorten the prompt to fewer than 10 tokens"),
    ],
)
def test_what_overflows_the_context_is_refused_with_what_would_do(
    num_prompt: int, max_tokens: int, advice: str
) -> None:
    with pytest.raises(RowError, match=advice) as caught:
        encoder(max_positions=10).encode(row("a" * num_prompt, max_tokens=max_tokens))

    assert caught.value.code == "context_length_exceeded"


def test_a_fallback_for_max_tokens_is_no_more_than_the_context_has_room_for() -> None:
    falling_back = encoder(max_positions=10, fallback_max_tokens=6)

    def max_tokens(num_prompt: int, **own: Any) -> int:
        return falling_back.encode(row("a" * num_prompt, **own)).sampling.max_tokens

    assert [max_tokens(1), max_tokens(7), max_tokens(1, max_tokens=9)] == [6, 3, 9]
    for num_prompt, own in ((10, {}), (7, {"max_tokens": 6})):
        with pytest.raises(RowError, match="context is 10 tokens"):
            max_tokens(num_prompt, **own)


def test_a_prompt_without_tokens_is_refused() -> None:
    class Deaf(ByteTokenizer):
        def encode(self, text: str) -> list[int]:
            return []

    with pytest.raises(RowError, match="no tokens") as caught:
        encoder(tokenizer=Deaf()).encode(row())

    assert caught.value.code == "empty_prompt"


def test_a_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(RowError, match="token id 10 is not in the vocabulary of 10 tokens"):
        encoder(vocab_size=10).encode(row((9, 10)))


def test_without_a_tokenizer_tokens_run_and_text_and_stop_strings_are_refused() -> None:
    blind = encoder(tokenizer=None)

    assert blind.encode(row((1, 2))).token_ids == (1, 2)
    for needs_text in (row("abc"), row((1, 2), stop=("x",))):
        with pytest.raises(RowError) as caught:
            blind.encode(needs_text)
        assert caught.value.code == "no_tokenizer"


def test_whatever_a_chat_template_raises_is_the_rows_error() -> None:
    class Strict(ByteTokenizer):
        def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
            raise ZeroDivisionError("roles must take turns")

    with pytest.raises(RowError, match="roles must take turns") as caught:
        encoder(tokenizer=Strict()).encode(row(Chat(messages=({"role": "user", "content": "x"},))))

    assert caught.value.code == "chat_template"

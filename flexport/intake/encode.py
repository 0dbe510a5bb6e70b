"""From a row to a request: tokens for text, and the command line's values under the row's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from flexport.errors import RowError
from flexport.intake.rows import Chat, Row
from flexport.records import Request, SamplingParams

__all__ = ["Encoder", "PromptTokenizer"]


class PromptTokenizer(Protocol):
    """What encoding a prompt takes."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a plain prompt, with what the model wants at its start."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, up to where the model's answer begins."""


class Encoder:
    """Makes requests of rows, for one model and one command line."""

    def __init__(
        self,
        tokenizer: PromptTokenizer | None,
        defaults: SamplingParams,
        *,
        max_positions: int | None = None,
        vocab_size: int | None = None,
        fallback_max_tokens: int | None = None,
    ) -> None:
        """`max_positions` is the model's context in tokens; None knows no bound.

        With `fallback_max_tokens`, a row that has no max_tokens of its own does not take the
        defaults' but this many, or as many as its prompt leaves room for: nobody asked for more.

        """
        self._tokenizer = tokenizer
        self._defaults = defaults
        self._max_positions = max_positions
        self._vocab_size = vocab_size
        self._fallback_max_tokens = fallback_max_tokens

    def encode(self, row: Row) -> Request:
        """The request of `row`. Raises RowError if it can't be run on this model."""
        token_ids = self._token_ids(row.prompt)
        sampling = self._sampling(row, len(token_ids))
        if not token_ids:
            raise RowError("empty_prompt", "the prompt has no tokens; there is nothing to continue")
        self._check_length(len(token_ids), sampling.max_tokens)
        prompt = row.prompt if isinstance(row.prompt, str) else None
        return Request(request_id=row.key, token_ids=token_ids, sampling=sampling, prompt=prompt)

    def _token_ids(self, prompt: str | tuple[int, ...] | Chat) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            if self._vocab_size is not None and max(prompt) >= self._vocab_size:
                raise RowError(
                    "invalid_value",
                    f"token id {max(prompt)} is not in the vocabulary of {self._vocab_size} tokens",
                )
            return prompt
        if self._tokenizer is None:
            raise RowError(
                "no_tokenizer", "the model has no tokenizer; give the prompt as prompt_token_ids"
            )
        if isinstance(prompt, str):
            return tuple(self._tokenizer.encode(prompt))
        try:
            return tuple(self._tokenizer.apply_chat_template(prompt.messages))
        except RowError:
            raise
        # A template is a program that came with the checkpoint: it may raise what it likes, often
        # on purpose (roles that do not take turns), and that is about this conversation only.
        except Exception as error:
            raise RowError(
                "chat_template", f"the chat template can't render these messages: {error}"
            ) from error

    def _sampling(self, row: Row, num_prompt: int) -> SamplingParams:
        overrides = dict(row.overrides)
        if self._fallback_max_tokens is not None and "max_tokens" not in overrides:
            overrides["max_tokens"] = self._fallback_max_tokens
            if self._max_positions is not None:
                room = max(1, self._max_positions - num_prompt)
                overrides["max_tokens"] = min(self._fallback_max_tokens, room)
        try:
            sampling = replace(self._defaults, **overrides)
        except ValueError as error:
            raise RowError("invalid_value", str(error)) from error
        if sampling.stop and self._tokenizer is None:
            raise RowError(
                "no_tokenizer", "the model has no tokenizer, so stop strings can't be met"
            )
        return sampling

    def _check_length(self, num_prompt: int, max_tokens: int) -> None:
        if self._max_positions is None or num_prompt + max_tokens <= self._max_positions:
            return
        room = self._max_positions - num_prompt
        advice = (
            f"the largest max_tokens that would do is {room}"
            if room >= 1
            else f"shorten the prompt to at most {self._max_positions - max_tokens} tokens"
            if max_tokens < self._max_positions
            else f"shorten the prompt to fewer than {self._max_positions} tokens"
        )
        raise RowError(
            "context_length_exceeded",
            f"the model's context is {self._max_positions} tokens; the prompt has {num_prompt} and "
            f"max_tokens asks for {max_tokens} more; {advice}",
        )

"""An engine without a model: answers are a fixed function of the prompt's tokens.

For tests of what stands around an engine. It packs rows into blocks as the real one does, so
answers come late and out of order, and it stops rows by the same rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from flexport.intake.pack import pack
from flexport.output.decode import RowDecoder
from flexport.records import Completion, FinishReason, Request

__all__ = ["ByteTokenizer", "FakeEngine"]


class ByteTokenizer:
    """A token a byte: token ids are UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(text.encode())

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """A line a message, and the beginning of the assistant's."""
        lines = [f"{message['role']}: {message['content']}\n" for message in messages]
        return self.encode("".join(lines) + "assistant: ")

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the bytes; what is no character shows as a replacement character."""
        return bytes(token_ids).decode(errors="replace")


class FakeEngine:
    """Says lower-case letters; which ones depends on the row's tokens and seed alone."""

    def __init__(self, *, batch_size: int = 4, window: int = 16) -> None:
        self.tokenizer = ByteTokenizer()
        self._batch_size = batch_size
        self._window = window

    def generate(
        self, requests: Iterable[Request], *, num_rows: int | None = None
    ) -> Iterator[Completion]:
        """Completions block by block, the shortest of a block first."""
        for batch in pack(requests, self._batch_size, self._window):
            yield from sorted(
                map(self._complete, batch), key=lambda completion: len(completion.token_ids)
            )

    def _complete(self, request: Request) -> Completion:
        sampling = request.sampling
        decoder = RowDecoder(self.tokenizer, sampling.stop, min_tokens=sampling.min_tokens)
        state = repr((request.token_ids, sampling.seed)).encode()
        reason: FinishReason = "length"
        for _ in range(sampling.max_tokens):
            state = blake2b(state, digest_size=8).digest()
            if decoder.push(ord("a") + state[0] % 26):
                reason = "stop"
                break
        return Completion(
            request=request,
            token_ids=decoder.token_ids,
            text=decoder.text,
            finish_reason=reason,
        )

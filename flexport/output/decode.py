"""A row's tokens as text, while they come: finds stop strings, also across token borders.

The text of a token depends on its neighbours: a character may take several tokens, and some
tokenizers drop a space at the very start. So a short window of tokens is decoded behind a prefix
whose text is known, never the whole row again. Without stop strings nothing is decoded before the
end. Both byte-level and sentencepiece-like tokenizers are met: their text only ever grows, apart
from replacement characters at its end that stand for a character still under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

__all__ = ["RowDecoder", "TextDecoder"]

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextDecoder(Protocol):
    """What making text takes."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of the tokens; special ones have none, bytes that are no character show as �."""


class RowDecoder:
    """The text of one row. Without a tokenizer it keeps the tokens, and the text stays empty."""

    def __init__(
        self,
        tokenizer: TextDecoder | None,
        stop: Sequence[str] = (),
        *,
        min_tokens: int = 0,
        context: Sequence[int] = (),
    ) -> None:
        """A stop string that is complete within the first `min_tokens` tokens does not count.

        `context` is the end of the prompt (a few tokens). With it, the text is what comes after
        the prompt; without it, what the tokens are on their own, which with sentencepiece-like
        tokenizers has lost its leading space.
        """
        assert all(stop), stop
        assert tokenizer is not None or not stop, "stop strings need a tokenizer"
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._context = list(context)
        self._token_ids: list[int] = []
        self._prefix = list(context)
        """Tokens whose text is settled, kept since the text of the next ones depends on them."""
        self._prefix_text = self._decode(self._prefix) if stop else ""
        self._pending: list[int] = []
        """Tokens after the prefix: a character under way, or no text yet."""
        self._settled = ""
        """The text up to the pending tokens."""
        self._searched_to = 0
        """No stop string that counts ends at or before this place in the text."""
        self._text_before_stop: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The tokens so far; the last one completed the stop string, if one has appeared."""
        return tuple(self._token_ids)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._text_before_stop is not None

    @property
    def text(self) -> str:
        """The text so far, up to the stop string if one has appeared.

        A character that is still incomplete shows as the tokenizer shows it.
        """
        if self._text_before_stop is not None:
            return self._text_before_stop
        before = self._decode(self._context)
        return self._decode(self._context + self._token_ids)[len(before) :]

    def push(self, token_id: int) -> bool:
        """Take the next token; True when a stop string has appeared, after which none may come."""
        assert not self.stopped, "the row has stopped"
        self._token_ids.append(token_id)
        if not self._stop:
            return False

        self._pending.append(token_id)
        window = self._decode(self._prefix + self._pending)[len(self._prefix_text) :]
        whole = window.rstrip(REPLACEMENT)
        self._search(self._settled + whole)
        if window and window == whole:
            self._settle(window)
        elif not window and self._prefix_text:
            self._pending.pop()  # a special token: it has no text, and changes no other's
        return self.stopped

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids) if self._tokenizer and token_ids else ""

    def _search(self, text: str) -> None:
        if len(self._token_ids) > self._min_tokens:
            places = (
                text.find(string, max(0, self._searched_to - len(string) + 1))
                for string in self._stop
            )
            place = min((place for place in places if place >= 0), default=None)
            if place is not None:
                self._text_before_stop = text[:place]
        self._searched_to = max(self._searched_to, len(text))

    def _settle(self, window: str) -> None:
        self._settled += window
        self._prefix, self._pending = self._pending, []
        self._prefix_text = self._decode(self._prefix)

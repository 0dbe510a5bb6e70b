"""Text to token ids and back, as the model's own tokenizer files say.

Built on transformers' AutoTokenizer, since what a family adds to a prompt (OPT begins each with
</s>) and how old vocabularies become fast ones is knowledge that lives there. Code that comes
with a checkpoint is never run. transformers takes about a second to import, so that happens when
a tokenizer is opened and not before. A plan only wants to know how long prompts are, at once: what
counts their tokens reads the same files without transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

from flexport.errors import CheckpointError, RowError

__all__ = ["TokenCounter", "Tokenizer", "open_tokenizer"]

_FILES = ("tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "spiece.model")
"""A directory with none of them has no vocabulary."""

TOKEN_BYTES = 4
"""Of English text a token, as vocabularies of some ten thousand words cut it."""

MESSAGE_TOKENS = 8
"""What chat templates put around a message: role, marks, line breaks."""


def open_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a model directory, or None if it has none.

    Without one, prompts must come as token ids. Raises CheckpointError for files that can't be
    read.
    """
    if not any((directory / name).is_file() for name in _FILES):
        return None
    return Tokenizer(directory)


class Tokenizer:
    """One model's tokenizer; may be called from any thread."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoTokenizer

        # Rust tokenizers refuse to be borrowed by two threads at once, and Python ones don't
        # promise anything.
        self._lock = Lock()
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # its readers raise whatever their format's library raises
            raise CheckpointError(
                f"can't read the tokenizer in {directory}: {error}; give prompts as "
                "prompt_token_ids, or replace the tokenizer's files"
            ) from error

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The end-of-sequence token, if there is one."""
        eos: int | None = self._inner.eos_token_id
        return () if eos is None else (eos,)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the model wants around it."""
        return self._encode(text, add_special_tokens=True)

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of text that continues a prompt: no special tokens around it."""
        return self._encode(text, add_special_tokens=False)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ending where the model's answer begins.

        Raises RowError if the model has no chat template. A template is a program and raises what
        it likes for messages that it does not take.
        """
        if not self._inner.chat_template:
            raise RowError(
                "no_chat_template",
                "the model has no chat template, so it can't take messages; give a prompt",
            )
        with self._lock:
            ids = self._inner.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
            )
        return [int(token_id) for token_id in ids]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids, to the letter: no spaces are tidied away around punctuation."""
        with self._lock:
            text: str = self._inner.decode(
                list(token_ids),
                skip_special_tokens=skip_special_tokens,
                clean_up_tokenization_spaces=False,
            )
        return text

    def _encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        with self._lock:
            # verbose=False: whether a prompt is too long is for the engine to say.
            ids: list[int] = self._inner.encode(
                text, add_special_tokens=add_special_tokens, verbose=False
            )
        return ids


class TokenCounter:
    """Tells how many tokens a prompt has; of what it gives, only the length means anything.

    A conversation's is a little off, since its template is not applied.
    """

    def __init__(self, directory: Path | None) -> None:
        """Of a model directory. Raises CheckpointError for a vocabulary that can't be read."""
        self._inner = None if directory is None else _fast_tokenizer(directory)

    @property
    def has_vocabulary(self) -> bool:
        """Whether tokens are counted; else they are taken to be TOKEN_BYTES long."""
        return self._inner is not None

    def encode(self, text: str) -> list[int]:
        """As many as `Tokenizer.encode` gives."""
        if self._inner is None:
            return [0] * -(-len(text.encode(errors="replace")) // TOKEN_BYTES)
        ids: list[int] = self._inner.encode(text).ids
        return ids

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """About as many as `Tokenizer.apply_chat_template` gives."""
        text = "\n".join(str(message.get("content") or "") for message in messages)
        return [*self.encode(text), *[0] * (MESSAGE_TOKENS * (len(messages) + 1))]


def _fast_tokenizer(directory: Path) -> Any:
    """The library's own, from whichever files it can read; None if there are none."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers import Tokenizer as Fast

    whole, vocabulary, merges = (
        directory / name for name in ("tokenizer.json", "vocab.json", "merges.txt")
    )
    found: Any
    try:
        if whole.is_file():
            found = Fast.from_file(str(whole))
        elif vocabulary.is_file() and merges.is_file():
            found = ByteLevelBPETokenizer(str(vocabulary), str(merges))
        else:
            return None
    except Exception as error:  # the library raises plain Exceptions
        raise CheckpointError(f"can't read the tokenizer in {directory}: {error}") from error
    found.no_truncation()
    found.no_padding()
    return found

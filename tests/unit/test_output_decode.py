from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from flexport.output.decode import RowDecoder, TextDecoder
from flexport.testing.fake_engine import ByteTokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Sentencepiece:
    """Pieces with a mark for spaces, bytes for what has no piece, the first space dropped."""

    pieces = ("▁", "▁the", "▁a", "he", "t", "e", "a", "n", "▁n", "b", "!", "▁\n", "\n")

    def __init__(self) -> None:
        names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *self.pieces]
        vocab = {name: index for index, name in enumerate(names)}
        self._inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
        self._inner.decoder = decoders.Sequence([
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ])  # fmt: skip
        self._inner.add_special_tokens([AddedToken("</s>", special=True)])
        self.eos = 1
        self.first_piece = names.index("▁")
        self.num_tokens = len(names)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._inner.decode(list(token_ids), skip_special_tokens=True)

    def ids_of(self, character: str) -> list[int]:
        """The bytes of a character, as tokens."""
        return [2 + byte for byte in character.encode()]


def decoded_naively(
    tokenizer: TextDecoder, token_ids: Sequence[int], stop: Sequence[str], min_tokens: int
) -> tuple[str, int, bool]:
    """Text, number of tokens taken and whether it stopped, by decoding everything every time."""
    allowed_from = 0
    for num_taken in range(1, len(token_ids) + 1):
        text = tokenizer.decode(token_ids[:num_taken]).rstrip(REPLACEMENT)
        if num_taken <= min_tokens:
            allowed_from = len(text)
            continue
        places = [
            place
            for string in stop
            for place in range(len(text))
            if text.startswith(string, place) and place + len(string) > allowed_from
        ]
        if places:
            return text[: min(places)], num_taken, True
    return tokenizer.decode(token_ids), len(token_ids), False


def pushed(decoder: RowDecoder, token_ids: Sequence[int]) -> None:
    for token_id in token_ids:
        if decoder.push(token_id):
            break


short_texts = st.text(alphabet="ab€\n😀", min_size=1, max_size=3)


@given(
    text=st.text(alphabet="ab€\n😀", max_size=30),
    cut=st.integers(0, 3),
    garbage=st.binary(max_size=4),
    stop=st.lists(short_texts, max_size=3),
    min_tokens=st.integers(0, 12),
)
def test_bytes_give_what_decoding_everything_every_time_would_give(
    text: str, cut: int, garbage: bytes, stop: list[str], min_tokens: int
) -> None:
    encoded = text.encode()
    token_ids = list(encoded[: len(encoded) - cut] + garbage + encoded)
    decoder = RowDecoder(ByteTokenizer(), stop, min_tokens=min_tokens)

    pushed(decoder, token_ids)

    found = (decoder.text, len(decoder.token_ids), decoder.stopped)
    assert found == decoded_naively(ByteTokenizer(), token_ids, stop, min_tokens)


@given(data=st.data(), stop=st.lists(st.sampled_from(["the", " a", "\n", "€", "e n", "b!"])))
def test_pieces_give_what_decoding_everything_every_time_would_give(
    data: st.DataObject, stop: list[str]
) -> None:
    tokenizer = Sentencepiece()
    piece = st.integers(tokenizer.first_piece, tokenizer.num_tokens - 1).map(lambda one: [one])
    character = st.sampled_from("€é😀").map(tokenizer.ids_of)
    groups = data.draw(st.lists(piece | character | st.just([tokenizer.eos]), max_size=20))
    token_ids = [token_id for group in groups for token_id in group]
    decoder = RowDecoder(tokenizer, stop)

    pushed(decoder, token_ids)

    found = (decoder.text, len(decoder.token_ids), decoder.stopped)
    assert found == decoded_naively(tokenizer, token_ids, stop, 0)


def test_a_stop_string_across_token_borders_is_found_and_cut_off() -> None:
    decoder = RowDecoder(ByteTokenizer(), ["END"])

    stops = [decoder.push(byte) for byte in b"the END"]

    assert stops == [False] * 6 + [True]
    assert decoder.text == "the "
    assert decoder.token_ids == tuple(b"the END")


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    class Words:
        def decode(self, token_ids: Sequence[int]) -> str:
            return "".join(("one two three",)[token_id] for token_id in token_ids)

    decoder = RowDecoder(Words(), ["three", "two"])

    decoder.push(0)

    assert decoder.text == "one "


def test_a_stop_string_within_the_least_number_of_tokens_does_not_count() -> None:
    decoder = RowDecoder(ByteTokenizer(), ["a"], min_tokens=2)

    stops = [decoder.push(byte) for byte in b"aaba"]

    assert stops == [False, False, False, True]
    assert decoder.text == "aab"


def test_a_character_under_way_decides_nothing() -> None:
    decoder = RowDecoder(ByteTokenizer(), ["€"])
    first, second, third = "€".encode()

    stops = [decoder.push(first), decoder.push(second), decoder.push(third)]

    assert stops == [False, False, True]
    assert decoder.text == ""


def test_with_the_end_of_the_prompt_the_leading_space_is_kept() -> None:
    tokenizer = Sentencepiece()
    the, b = tokenizer.first_piece + 1, tokenizer.first_piece + 9
    alone = RowDecoder(tokenizer, ["!"])
    after_prompt = RowDecoder(tokenizer, ["!"], context=[b])

    for decoder in (alone, after_prompt):
        pushed(decoder, [the, b])

    assert alone.text == "theb"
    assert after_prompt.text == " theb"
    assert after_prompt.token_ids == (the, b)


def test_an_endless_row_is_not_decoded_again_and_again() -> None:
    class Counting(ByteTokenizer):
        num_decoded = 0

        def decode(self, token_ids: Sequence[int]) -> str:
            Counting.num_decoded += len(token_ids)
            return super().decode(token_ids)

    decoder = RowDecoder(Counting(), ["never"])

    pushed(decoder, b"a" * 1000)

    assert Counting.num_decoded <= 4 * 1000


def test_without_stop_strings_nothing_is_decoded_before_the_end() -> None:
    class Never:
        def decode(self, token_ids: Sequence[int]) -> str:
            raise AssertionError("decoded too early")

    decoder = RowDecoder(Never())

    pushed(decoder, [1, 2, 3])

    assert decoder.token_ids == (1, 2, 3)


def test_without_a_tokenizer_the_tokens_are_kept_and_the_text_is_empty() -> None:
    decoder = RowDecoder(None)

    pushed(decoder, [5, 6])

    assert (decoder.token_ids, decoder.text, decoder.stopped) == ((5, 6), "", False)


def test_a_stopped_row_takes_no_more_tokens() -> None:
    decoder = RowDecoder(ByteTokenizer(), ["a"])
    decoder.push(ord("a"))

    with pytest.raises(AssertionError, match="stopped"):
        decoder.push(ord("b"))

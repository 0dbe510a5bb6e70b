"""Text to ids and back, from directories as they are found on the hub."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers
from tokenizers.pre_tokenizers import ByteLevel

from flexport.errors import CheckpointError, RowError
from flexport.tokenizer import TokenCounter, Tokenizer, open_tokenizer

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def vocabulary() -> dict[str, int]:
    letters = sorted(ByteLevel.alphabet())
    return {token: index for index, token in enumerate([*SPECIAL, *letters, "he"])}


def opt_directory(folder: Path) -> Path:
    """Files as in facebook/opt-*: a GPT-2 vocabulary, and </s> before each prompt."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary()))
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "unk_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "opt"}')
    return folder


def chat_directory(folder: Path) -> Path:
    """A tokenizer.json with a chat template, and no special token before a prompt."""
    raw = RawTokenizer(models.BPE(vocab=vocabulary(), merges=[("h", "e")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    raw.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "</s>",
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def opened(folder: Path) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def test_an_opt_prompt_begins_with_the_end_token_and_a_continuation_does_not(tmp_path):
    tokenizer = opened(opt_directory(tmp_path))

    prompt_ids = tokenizer.encode("hello")
    continuation_ids = tokenizer.encode_continuation("hello")

    assert prompt_ids == [2, *continuation_ids]
    assert continuation_ids[0] == vocabulary()["he"]
    assert tokenizer.eos_token_ids == (2,)


@pytest.mark.parametrize("text", ["hello", " it 's , here .", "tab\tand\nline", "naïve 雪 🙂", ""])
def test_decoding_gives_the_text_back_to_the_letter(tmp_path, text):
    tokenizer = opened(opt_directory(tmp_path))

    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_shown_only_on_request(tmp_path):
    tokenizer = opened(opt_directory(tmp_path))
    ids = [*tokenizer.encode("he"), 2]

    assert tokenizer.decode(ids) == "he"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "</s>he</s>"


def test_a_conversation_ends_where_the_answer_begins(tmp_path):
    tokenizer = opened(chat_directory(tmp_path))

    ids = tokenizer.apply_chat_template([{"role": "user", "content": "he"}])

    assert all(type(token_id) is int for token_id in ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "user: he</s>assistant:"


def test_messages_for_a_model_without_a_chat_template_are_a_row_error(tmp_path):
    tokenizer = opened(opt_directory(tmp_path))

    with pytest.raises(RowError, match="no chat template") as refusal:
        tokenizer.apply_chat_template([{"role": "user", "content": "he"}])

    assert refusal.value.code == "no_chat_template"


def test_a_directory_without_tokenizer_files_has_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')

    assert open_tokenizer(tmp_path) is None


def test_a_damaged_tokenizer_is_a_checkpoint_error_that_names_the_directory(tmp_path):
    folder = chat_directory(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')

    with pytest.raises(CheckpointError) as refusal:
        open_tokenizer(folder)

    assert str(folder) in str(refusal.value)
    assert "prompt_token_ids" in str(refusal.value)


def test_threads_may_share_a_tokenizer(tmp_path):
    tokenizer = opened(opt_directory(tmp_path))
    texts = [f"line {number} " * 50 for number in range(40)]

    with ThreadPoolExecutor(4) as pool:
        back = list(pool.map(lambda text: tokenizer.decode(tokenizer.encode(text)), texts))

    assert back == texts


@pytest.mark.parametrize("directory", [opt_directory, chat_directory])
@pytest.mark.parametrize("text", ["hello", "hehehe " * 20, "naïve 雪 🙂"])
def test_what_only_counts_tokens_counts_as_many(tmp_path, directory, text):
    folder = directory(tmp_path)

    counter = TokenCounter(folder)

    assert counter.has_vocabulary
    # Of OPT's files, the library alone doesn't know that each prompt begins with one more.
    assert len(opened(folder).encode(text)) - len(counter.encode(text)) in (0, 1)


def test_a_conversation_is_counted_with_room_for_its_template(tmp_path):
    folder = chat_directory(tmp_path)
    messages = [{"role": "user", "content": "he" * 30}, {"role": "assistant", "content": "he"}]

    counted = len(TokenCounter(folder).apply_chat_template(messages))

    assert 31 < counted < 31 + 10 * len(messages) + 10


def test_without_a_vocabulary_four_bytes_are_a_token(tmp_path):
    counter = TokenCounter(tmp_path)

    assert not counter.has_vocabulary
    assert [len(counter.encode(text)) for text in ("", "abc", "abcd", "雪雪")] == [0, 1, 1, 2]


def test_a_vocabulary_that_can_not_be_read_is_an_error_that_names_the_directory(tmp_path):
    folder = chat_directory(tmp_path)
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')

    with pytest.raises(CheckpointError, match="can't read the tokenizer") as refusal:
        TokenCounter(folder)

    assert str(folder) in str(refusal.value)

"""Laws of the embedded demo: its records come from seeds alone, and its model does its job."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from flexport import demo
from flexport.demo.data import (
    DEMO_SEED,
    PROMPT_END,
    TRAIN_SEED,
    held_out_names,
    make_records,
    training_names,
)

NUM_SAMPLE_ROWS = 40


def input_rows() -> list[dict[str, Any]]:
    with demo.INPUT_PATH.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_same_seed_gives_the_same_records():
    first = list(itertools.islice(make_records("a seed", subset="train"), 50))

    again = list(itertools.islice(make_records("a seed", subset="train"), 50))
    other = list(itertools.islice(make_records("another seed", subset="train"), 50))

    assert first == again
    assert first != other


def test_the_committed_job_is_what_the_seed_makes():
    rows = input_rows()
    answers = demo.expected()

    records = list(itertools.islice(make_records(DEMO_SEED, subset="demo"), len(rows)))

    assert [row["prompt"] for row in rows] == [record.prompt for record in records]
    assert list(answers.values()) == [record.answer for record in records]


def test_every_row_of_the_job_has_an_answer_and_every_answer_a_row():
    ids = [row["id"] for row in input_rows()]

    answered = list(demo.expected())

    assert len(set(ids)) == len(ids) >= 200
    assert answered == ids


def test_every_value_but_a_renamed_one_stands_in_the_record():
    records = itertools.islice(make_records(DEMO_SEED, subset="demo"), 300)

    fields = [
        (record.prompt, dict(part.split(": ") for part in record.answer.split("; ")))
        for record in records
    ]

    for prompt, values in fields:
        assert prompt.endswith(PROMPT_END)
        for key in {"name", "city", "item", "price", "code"} & values.keys():
            assert values[key] in prompt


def test_no_name_of_a_demo_record_occurs_in_training():
    training = itertools.islice(make_records(TRAIN_SEED, subset="train"), 20_000)
    unseen = list(itertools.islice(make_records(DEMO_SEED, subset="demo"), 300))

    training_prompts = {record.prompt for record in training}
    names = {record.answer.split("; ")[0].removeprefix("name: ") for record in unseen}
    words = {word for name in names for word in name.split()}

    assert words <= held_out_names()
    assert not held_out_names() & training_names()
    assert not training_prompts & {record.prompt for record in unseen}


def test_accuracy_counts_exact_rows_and_error_rows_are_wrong():
    rows: list[dict[str, Any]] = [
        {"id": "a", "text": " name: Ann \n"},
        {"id": "b", "text": "name: Bo"},
        {"id": "c", "error": {"code": "too_long", "message": "no"}},
        {"id": "stranger", "text": "name: Ann"},
    ]
    answers = {"a": "name: Ann", "b": "name: Bob", "c": "name: Cy"}

    result = demo.accuracy(rows, answers)

    assert result == demo.Accuracy(num_rows=4, num_exact=1)
    assert result.share == 0.25


def test_no_rows_are_no_accuracy():
    assert demo.accuracy([]).share == 0.0


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(demo.MODEL_DIR, local_files_only=True)


def test_the_tokenizer_gives_every_text_back_exactly(tokenizer):
    texts = [str(row["prompt"]) for row in input_rows()] + list(demo.expected().values())

    ids = tokenizer(texts)["input_ids"]

    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    assert all(row[0] == tokenizer.bos_token_id for row in ids)


def test_prompts_and_answers_fit_the_model_and_are_ragged(tokenizer):
    rows = input_rows()
    config = json.loads((demo.MODEL_DIR / "config.json").read_text(encoding="utf-8"))

    prompt_lengths = [len(ids) for ids in tokenizer([r["prompt"] for r in rows])["input_ids"]]
    answer_lengths = [len(ids) for ids in tokenizer(list(demo.expected().values()))["input_ids"]]

    # An answer's leading bos and its closing eos are one token each.
    assert all(
        answer <= row["max_tokens"] for answer, row in zip(answer_lengths, rows, strict=True)
    )
    assert all(
        prompt + row["max_tokens"] <= config["max_position_embeddings"]
        for prompt, row in zip(prompt_lengths, rows, strict=True)
    )
    assert max(prompt_lengths) > 3 * min(prompt_lengths)
    assert max(answer_lengths) > 2 * min(answer_lengths)


def test_the_model_answers_at_least_95_percent_exactly_in_float32(tokenizer):
    torch = pytest.importorskip("torch")
    from transformers import OPTForCausalLM

    model = OPTForCausalLM.from_pretrained(
        demo.MODEL_DIR, dtype=torch.float32, local_files_only=True
    )
    sample = input_rows()[:NUM_SAMPLE_ROWS]
    batch = tokenizer(
        [row["prompt"] for row in sample], padding=True, padding_side="left", return_tensors="pt"
    )

    with torch.inference_mode():
        ids_BL = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=max(row["max_tokens"] for row in sample),
            do_sample=False,
        )
    texts = tokenizer.batch_decode(
        ids_BL[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    result = demo.accuracy(
        {"id": row["id"], "text": text} for row, text in zip(sample, texts, strict=True)
    )

    assert result.num_rows == NUM_SAMPLE_ROWS
    assert result.share >= 0.95

"""The tiny checkpoints that other tests stand on: loadable, reproducible, and talkative."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexport.checkpoint import open_checkpoint
from flexport.testing.checkpoints import VARIANTS, tiny_opt


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_tokens_of_every_variant_vary_with_the_prompt(tmp_path: Path, variant: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    directory = tiny_opt(tmp_path, variant=variant)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompts = torch.tensor([[2, 10, 11], [2, 10, 12], [2, 200, 7]])

    tokens = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=12, do_sample=False,
        eos_token_id=None,
    )[:, 3:].tolist()  # fmt: skip

    assert len({tuple(row) for row in tokens}) == 3
    assert all(len(set(row)) >= 4 for row in tokens)


def test_a_seed_gives_the_same_weights_again_and_another_seed_others(tmp_path: Path) -> None:
    one, same, other = (
        (tiny_opt(tmp_path / str(index), seed=seed) / "model.safetensors").read_bytes()
        for index, seed in enumerate((3, 3, 4))
    )

    assert one == same
    assert one != other


def test_shards_dtype_and_config_are_as_asked(tmp_path: Path) -> None:
    directory = tiny_opt(tmp_path, shards=3, dtype="bfloat16", num_hidden_layers=2)

    checkpoint = open_checkpoint(str(directory))

    assert len({tensor.path for tensor in checkpoint.tensors.values()}) >= 3
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"bfloat16"}
    assert checkpoint.config["num_hidden_layers"] == 2


def test_the_byte_tokenizer_takes_any_text_there_and_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    directory = tiny_opt(tmp_path, tokenizer=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text = "Zwölf  Boxkämpfer\n\t🥊 </x>"

    ids = tokenizer(text)["input_ids"]

    assert ids[0] == json.loads((directory / "config.json").read_text())["bos_token_id"]
    assert len(ids) == 1 + len(text.encode())
    assert max(ids) < 260
    assert tokenizer.decode(ids, skip_special_tokens=True) == text

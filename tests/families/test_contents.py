"""What a checkpoint holds beside or in place of what its config says: used, told, or refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VARIANTS, Variant, make
from torch import Tensor
from transformers import AutoModelForCausalLM

import flexport
from flexport import Policy, SamplingParams
from flexport.engine.source import open_source
from flexport.errors import CheckpointError, UnsupportedModel

PROMPTS = [[5, 17, 60, 33, 8, 71, 12], [40], [9, 9, 81, 3]]
NEW_TOKENS = 6

POLICIES = {
    "in memory": Policy.splits_from_percent([100, 0, 100, 0, 100, 0]),
    "on disk": Policy.splits_from_percent([0, 0, 0, 0, 0, 0]),
    "cut": Policy.splits_from_percent([35, 0, 50, 0, 60, 0]),
}


def variant(family: str, name: str) -> Variant:
    base, changes = VARIANTS[family]
    return Variant(family, name, {**base, **changes[name]})


def rewrite(directory: Path, change: Any) -> None:
    """Lay all tensors of a directory into one file, as `change` returns them."""
    state: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        state.update(load_file(path))
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(change(state), directory / "model.safetensors")


@torch.no_grad()
def as_transformers_continues(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    continued = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        continued.append(ids[len(prompt) :])
    return continued


def as_flexport_continues(directory: Path, policy: Policy) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
    memory: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB"}
    with flexport.LLM(directory, backend="cpu", dtype="float32", policy=policy, **memory) as llm:
        outputs = llm.generate(PROMPTS, params)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("split", POLICIES)
@pytest.mark.parametrize(
    "model",
    [variant("qwen3", "biases"), variant("gemma2", "caps, every second layer")],
    ids=str,
)
def test_tensors_of_several_dtypes_count_for_what_they_hold(model, split, tmp_path):
    make(model, tmp_path)
    matrices = {"embed_tokens": torch.float16, "down_proj": torch.float32}

    def mixed(state):
        return {
            name: tensor
            if tensor.dim() == 1
            else tensor.to(next((d for n, d in matrices.items() if n in name), torch.bfloat16))
            for name, tensor in state.items()
        }

    rewrite(tmp_path, mixed)
    weights, cache, activations = POLICIES[split]
    policy = Policy(weights=weights, cache=cache, activations=activations, batch_size=2)

    tokens = as_flexport_continues(tmp_path, policy)

    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {
        torch.float16,
        torch.bfloat16,
        torch.float32,
    }
    assert tokens == as_transformers_continues(tmp_path)


@pytest.mark.parametrize("copied", [True, False], ids=["a copy", "another"])
def test_a_head_beside_the_token_table_counts_if_it_is_another(copied, tmp_path):
    make(variant("llama", "tied head"), tmp_path)
    generator = torch.Generator().manual_seed(3)

    def with_head(state):
        table = state["model.embed_tokens.weight"]
        head = table.clone() if copied else torch.randn(table.shape, generator=generator)
        return {**state, "lm_head.weight": head}

    rewrite(tmp_path, with_head)
    weights, cache, activations = POLICIES["in memory"]
    policy = Policy(weights=weights, cache=cache, activations=activations, batch_size=2)

    source = open_source(str(tmp_path), None, "auto")
    tokens = as_flexport_continues(tmp_path, policy)

    assert source.spec.tied_head is copied
    assert tokens == as_transformers_continues(tmp_path)


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    make(variant("qwen2", "no windows"), tmp_path)
    gone = "model.layers.1.self_attn.q_proj.bias"
    rewrite(tmp_path, lambda state: {n: t for n, t in state.items() if n != gone})

    with pytest.raises(CheckpointError, match="q_proj"):
        open_source(str(tmp_path), None, "auto")


def test_what_is_not_text_is_left_out_and_told(tmp_path, caplog):
    make(variant("gemma3", "text part"), tmp_path)

    with caplog.at_level(logging.WARNING, logger="flexport"):
        source = open_source(str(tmp_path), None, "auto")

    assert source.files is not None
    assert all(name.startswith("language_model.") for name in source.files)
    (record,) = caplog.records
    assert "multi_modal_projector, vision_tower" in record.getMessage()


def test_a_part_that_no_one_knows_is_refused_beside_text_too(tmp_path):
    make(variant("llava", "text part"), tmp_path)
    rewrite(tmp_path, lambda state: {**state, "audio_tower.proj.weight": torch.ones(3)})

    with pytest.raises(UnsupportedModel, match=r"audio_tower\.proj\.weight"):
        open_source(str(tmp_path), None, "auto")


def test_a_text_part_is_found_behind_newer_prefixes_too(tmp_path):
    make(variant("llava", "text part"), tmp_path)
    rewrite(
        tmp_path,
        lambda state: {
            name.replace("language_model.lm_head", "lm_head")
            .replace("language_model.model", "model.language_model")
            .replace("vision_tower", "model.vision_tower"): tensor
            for name, tensor in state.items()
        },
    )

    source = open_source(str(tmp_path), None, "auto")

    assert source.files is not None
    assert "lm_head.weight" in source.files
    assert "model.language_model.layers.0.mlp.up_proj.weight" in source.files


def test_a_text_config_may_lie_among_the_other_fields(tmp_path):
    make(variant("qwen2_vl", "text part"), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    nested = open_source(str(tmp_path), None, "auto").spec

    text = {n: v for n, v in config.pop("text_config").items() if n != "model_type"}
    path.write_text(json.dumps({**text, **config}))

    assert open_source(str(tmp_path), None, "auto").spec == nested

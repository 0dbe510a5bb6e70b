"""A family's checkpoints are read in every form in which they are published."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VARIANTS, Variant, make, variants
from torch import Tensor

from flexport.checkpoint.directory import SINGLE_FILE
from flexport.engine.shards import place_weights
from flexport.engine.source import open_source
from flexport.errors import UnsupportedModel
from flexport.models import layer_tensors
from flexport.models.multimodal import MULTIMODAL
from flexport.policy import Split

BUFFERS = {
    # What older versions of transformers saved beside the weights.
    "codegen": ("transformer.h.0.attn.causal_mask",),
    "falcon": ("transformer.h.0.self_attention.rotary_emb.inv_freq",),
    "gpt2": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "gpt_neox": (
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.0.attention.rotary_emb.inv_freq",
    ),
    "gptj": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "llama": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
    "phi": ("model.layers.0.self_attn.rotary_emb.inv_freq",),
}


def first_variant(family: str) -> Variant:
    base, changes = VARIANTS[family]
    name, change = next(iter(changes.items()))
    return Variant(family, name, {**base, **change})


def whole_state(directory: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        state.update(load_file(path))
    return state


def save_whole(state: dict[str, Tensor], directory: Path) -> None:
    """In place of the shards there."""
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    save_file(state, directory / SINGLE_FILE)


ALONE = [variant for variant in variants() if variant.family not in MULTIMODAL]
"""A text part has its own names with and without the rest of its model."""


@pytest.mark.parametrize("variant", ALONE, ids=str)
def test_a_bare_model_with_its_head_is_read_as_the_whole_is(variant, tmp_path):
    model = make(variant, tmp_path / "whole")
    model.base_model.save_pretrained(tmp_path / "bare")
    whole = open_source(str(tmp_path / "whole"), None, "auto")
    saved, bare_state = whole_state(tmp_path / "whole"), whole_state(tmp_path / "bare")
    for tensor in layer_tensors(whole.spec, whole.spec.head_layer):
        if not set(tensor.names) & set(bare_state):
            bare_state.update({name: saved[name] for name in tensor.names if name in saved})
    save_whole(bare_state, tmp_path / "bare")

    bare = open_source(str(tmp_path / "bare"), None, "auto")

    assert whole.files is not None
    assert bare.files is not None
    assert bare.spec == whole.spec
    assert len(bare.files) == len(whole.files)
    assert set(bare.files) != set(whole.files)


@pytest.mark.parametrize("family", list(BUFFERS))
def test_buffers_that_published_checkpoints_carry_along_are_passed_over(family, tmp_path):
    make(first_variant(family), tmp_path)
    state = whole_state(tmp_path)
    save_whole({**state, **{name: torch.zeros(1, 1) for name in BUFFERS[family]}}, tmp_path)

    source = open_source(str(tmp_path), None, "auto")

    assert source.files is not None
    assert set(source.files) == set(state)


def test_heads_that_are_apart_in_the_file_are_the_rows_of_one_tensor(tmp_path):
    base, changes = VARIANTS["stablelm"]
    make(Variant("stablelm", "2-12b", {**base, **changes["2-12b"]}), tmp_path)
    source = open_source(str(tmp_path), None, "auto")
    assert source.files is not None
    files = source.files

    layers = place_weights(
        source.spec,
        lambda tensor: source.stored(tensor, files),
        Split(device=0.5, host=0.25, disk=0.25),
    )

    own = [shard for shard in layers[1] if shard.slot == "q_norm.weight"]
    assert [shard.first_row for shard in own] == [0, 1, 2, 3]
    assert {shard.shape for shard in own} == {(1, 8)}


def test_a_tensor_that_no_layer_owns_is_refused(tmp_path):
    make(first_variant("gpt2"), tmp_path)
    state = {**whole_state(tmp_path), "transformer.h.0.crossattention.c_attn.bias": torch.zeros(1)}
    save_whole(state, tmp_path)

    with pytest.raises(UnsupportedModel, match="crossattention"):
        open_source(str(tmp_path), None, "auto")


def test_the_head_of_gpt_neox_is_found_by_its_newer_name_too(tmp_path):
    make(first_variant("gpt_neox"), tmp_path)
    state = whole_state(tmp_path)
    state["lm_head.weight"] = state.pop("embed_out.weight")
    save_whole(state, tmp_path)

    source = open_source(str(tmp_path), None, "auto")

    assert source.files is not None
    assert "lm_head.weight" in source.files

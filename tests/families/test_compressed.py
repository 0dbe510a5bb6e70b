"""Weights that flexport packs itself give the tokens of the numbers that they stand for, anywhere.

A tiny model is made again with its matrices rounded as the codec rounds them; transformers
continues that one.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import DEEPSEEK_SIZES, GPT_SIZES, LLAMA_SIZES
from transformers import AutoModelForCausalLM

import flexport
from flexport.codecs.compressed import compressed
from flexport.engine.source import open_source
from flexport.engine.stored import packed_layout
from flexport.errors import PolicyError
from flexport.models.tensors import owned_tensors
from flexport.testing.families import Variant
from flexport.testing.families.mixes import MIXES, Reference, reference_from, run
from flexport.testing.families.tiny import make

WIDE = {**LLAMA_SIZES, "hidden_size": 64, "intermediate_size": 192}

VARIANTS = [
    Variant("llama", "compressed", WIDE),
    Variant("gpt2", "compressed", {**GPT_SIZES, "n_embd": 64, "n_inner": 128}),
    Variant("mixtral", "compressed", {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Variant(
        "deepseek_v3",
        "compressed",
        {**DEEPSEEK_SIZES, "hidden_size": 64, "moe_intermediate_size": 64, "n_group": 4,
         "topk_group": 2},
    ),
]  # fmt: skip


def round_as(codec: str, source_dir: Path, rounded_dir: Path) -> int:
    """Make a directory's model again with the numbers that its packed matrices stand for."""
    form, source = compressed(codec), open_source(str(source_dir), None, "auto")
    assert form is not None and source.files is not None
    tensors, num_packed = {}, 0
    for path in source_dir.glob("*.safetensors"):
        tensors.update(load_file(path))
    for layer in range(source.spec.num_schedule_layers):
        for tensor in owned_tensors(source.spec, layer):
            layout = packed_layout(tensor, form)
            if layout is None:
                continue
            num_packed += 1
            (name,) = {part.name for part in source.stored(tensor, source.files).layout.parts}
            whole = tensors[name]
            values = whole[tensor.slice_of[0]] if tensor.slice_of else whole
            own_RD = values.T if tensor.transposed else values
            rounded_RD = form.decode(form.encode(own_RD), torch.empty(layout.shape), 0)
            values.copy_(rounded_RD.T if tensor.transposed else rounded_RD)
    rounded_dir.mkdir()
    for path in source_dir.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            (rounded_dir / path.name).write_bytes(path.read_bytes())
    save_file(tensors, rounded_dir / "model.safetensors", metadata={"format": "pt"})
    return num_packed


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model as it is published."""
    directory = tmp_path_factory.mktemp("whole") / "whole"
    make(request.param, directory)
    return directory


@pytest.fixture(scope="module", params=["int8", "int4:32"])
def rounded(
    request: pytest.FixtureRequest, whole: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Reference]:
    """A codec, and how transformers continues some prompts with the numbers that it makes."""
    directory = tmp_path_factory.mktemp("rounded") / "rounded"
    assert round_as(request.param, whole, directory) > 4
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    return request.param, replace(reference_from(model, directory), directory=whole)


@pytest.mark.parametrize("mix", list(MIXES))
def test_compressed_weights_give_the_tokens_of_their_numbers(mix, rounded, tmp_path):
    codec, reference = rounded

    tokens, report = run(reference, {**MIXES[mix], "compress_weights": codec}, tmp_path)

    assert tokens == reference.continuations
    assert report["compression"]["weights"]["codec"] == codec
    assert all(
        report["peak_bytes"][tier] <= report["predicted"][f"{tier}_bytes"]
        for tier in ("device", "host", "disk")
    )


def test_compressed_weights_rest_and_travel_in_their_bits(whole, tmp_path):
    sizes = {}
    for codec in ("none", "int8", "int4:32"):
        with flexport.LLM(
            whole,
            backend="cpu",
            dtype="float32",
            percent=(0, 0, 100, 0, 100, 0),
            compress_weights=codec,
            offload_dir=tmp_path,
        ) as llm:
            llm.generate([[5, 6, 7]], flexport.SamplingParams(max_tokens=2, ignore_eos=True))
            told = llm.report["compression"]["weights"]
            placed = llm.report["placement"]["weights"]["disk"]["bytes"]
        sizes[codec] = (told, placed)

    (_, plain_bytes), (int8, int8_bytes), (int4, int4_bytes) = sizes.values()
    assert 8 < int8["bits"] < 8.6
    assert 5 <= int4["bits"] < 6.5, "scales of groups of 32 are a bit each; tiles may be padded"
    for told, packed_bytes in ((int8, int8_bytes), (int4, int4_bytes)):
        num_weights = plain_bytes / 4
        expected = num_weights * (told["share"] * told["bits"] / 8 + (1 - told["share"]) * 4)
        assert packed_bytes == pytest.approx(expected, rel=0.001)


def test_a_packed_checkpoint_is_not_packed_again(whole, tmp_path):
    for path in whole.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(
        config.replace("{", '{"quantization_config": {"quant_method": "mxfp4"},', 1)
    )

    with pytest.raises(PolicyError, match="packed already, as mxfp4"):
        flexport.LLM(tmp_path, backend="cpu", compress_weights="int8")

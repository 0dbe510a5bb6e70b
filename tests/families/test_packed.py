"""Packed checkpoints are read in place, and give the tokens of the numbers that they stand for.

A tiny model is packed by the formats' own rules, and unpacked again into a plain checkpoint, which
transformers continues.

Dimension key: E experts, I features in, O features out, P groups, G values of a group.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import DEEPSEEK_SIZES, GPT_OSS_SIZES
from torch import Tensor
from transformers import AutoModelForCausalLM

import flexport
from flexport.errors import UnsupportedModel
from flexport.testing.families import Variant
from flexport.testing.families.mixes import MIXES, Reference, reference_from, run
from flexport.testing.families.tiny import make

NUMBERS = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

GPT_OSS = Variant(
    "gpt_oss", "packed", {**GPT_OSS_SIZES, "hidden_size": 64, "intermediate_size": 32}
)
DEEPSEEK = Variant("deepseek_v3", "packed", {**DEEPSEEK_SIZES, "n_group": 4, "topk_group": 2})

FP8_BLOCK = (8, 16)


def mxfp4_of(values_EIO: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks and scales of the matrices' nearest numbers, and these numbers, (E, I, O)."""
    groups_EOPG = values_EIO.transpose(1, 2).contiguous().unflatten(-1, (-1, 32))
    powers = (groups_EOPG.abs().amax(-1) / 6).clamp_min(2.0**-126).log2().ceil()
    scaled_EOPG = groups_EOPG / torch.exp2(powers)[..., None]
    nibbles = (scaled_EOPG[..., None] - NUMBERS).abs().argmin(-1)
    numbers_EOPG = NUMBERS[nibbles] * torch.exp2(powers)[..., None]
    low, high = nibbles.unflatten(-1, (16, 2)).unbind(-1)
    plain_EIO = numbers_EOPG.flatten(-2).transpose(1, 2).contiguous()
    return (low + 16 * high).to(torch.uint8), (powers + 127).to(torch.uint8), plain_EIO


def fp8_of(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales of their blocks, and what both stand for."""
    rows, columns = FP8_BLOCK
    scales = torch.empty(-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    packed = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    plain = torch.empty_like(values)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = values[block].abs().max() / 448
            packed[block] = (values[block] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[block] = packed[block].float() * scales[i, j]
    return packed, scales, plain


def pack(variant: Variant, whole: Path, packed: Path) -> None:
    """Make the model twice: with packed tensors, and with the numbers that these stand for."""
    make(variant, whole)
    plain: dict[str, Tensor] = {}
    for path in whole.glob("*.safetensors"):
        plain.update(load_file(path))
    state = dict(plain)
    for name, values in plain.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del state[name]
            state[f"{name}_blocks"], state[f"{name}_scales"], plain[name] = mxfp4_of(values)
        elif variant is DEEPSEEK and name.endswith("proj.weight"):
            state[name], state[f"{name}_scale_inv"], plain[name] = fp8_of(values)
    config = json.loads((whole / "config.json").read_text())
    for directory, tensors in ((whole, plain), (packed, state)):
        directory.mkdir(exist_ok=True)
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantised = {"quant_method": "mxfp4"}
    if variant is DEEPSEEK:
        quantised = {"quant_method": "fp8", "weight_block_size": list(FP8_BLOCK)}  # type: ignore[dict-item]
    (packed / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))


@pytest.fixture(scope="module", params=[GPT_OSS, DEEPSEEK], ids=["MXFP4", "FP8"])
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A packed model, and how transformers continues some prompts with its numbers."""
    directory = tmp_path_factory.mktemp("packed")
    pack(request.param, directory / "whole", directory / "packed")
    model = AutoModelForCausalLM.from_pretrained(directory / "whole", dtype=torch.float32).eval()
    return reference_from(model, directory / "packed")


@pytest.mark.parametrize("mix", list(MIXES))
def test_packed_checkpoints_give_the_tokens_of_their_numbers(mix, packed, tmp_path):
    tokens, report = run(packed, MIXES[mix], tmp_path)

    assert tokens == packed.continuations
    assert all(
        report["peak_bytes"][tier] <= report["predicted"][f"{tier}_bytes"]
        for tier in ("device", "host", "disk")
    )


def test_packed_weights_rest_packed(packed):
    file_bytes = (packed.directory / "model.safetensors").stat().st_size

    with flexport.LLM(packed.directory, backend="cpu", dtype="float32") as llm:
        llm.generate(packed.prompts[:1], flexport.SamplingParams(max_tokens=2))
        placed = llm.report["placement"]["weights"]["device"]["bytes"]

    assert placed < file_bytes  # the file has a header


@pytest.mark.parametrize(
    "quantised",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "bitsandbytes"},
    ],
    ids=lambda quantised: quantised["quant_method"],
)
def test_what_can_not_be_unpacked_is_refused_by_name(quantised, tmp_path):
    make(GPT_OSS, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": quantised}))

    with pytest.raises(UnsupportedModel, match=f"quant_method is '{quantised['quant_method']}'"):
        flexport.LLM(tmp_path, backend="cpu")

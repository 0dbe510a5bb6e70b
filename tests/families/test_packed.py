"""A packed checkpoint gives the tokens of the plain one that holds the same numbers.

The packed one has the names and shapes that published ones have; transformers runs the plain one.

Dimension key: E experts, F features out, D features in, P groups a row, B bytes of a group.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VARIANTS, Variant, make
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import flexport
from flexport import Policy, SamplingParams
from flexport.testing.discrete import DiscreteBackend

PROMPTS = [[5, 17, 60, 33, 8, 71, 12], [40], [9, 9, 81, 3]]
NEW_TOKENS = 8

State = dict[str, Tensor]
Packer = Callable[[State], tuple[State, State]]
"""From the tensors of a checkpoint to those of a packed one, and to the numbers these stand for."""

BLOCK = (16, 12)
"""Of FP8: no divisor of most sides of the tiny model's matrices."""


def to_mxfp4(state: State) -> tuple[State, State]:
    """Experts' matrices become random numbers, since not one of their own is among the few."""
    packed, plain = dict(state), dict(state)
    draw = torch.Generator().manual_seed(3)
    for name, tensor_EDF in state.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            num_experts, size, features = tensor_EDF.shape
            shape = (num_experts, features, size // 32)
            blocks_EFPB = torch.randint(0, 256, (*shape, 16), generator=draw).to(torch.uint8)
            scales_EFP = torch.randint(121, 125, shape, generator=draw).to(torch.uint8)
            del packed[name]
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = blocks_EFPB, scales_EFP
            plain[name] = convert_moe_packed_tensors(blocks_EFPB, scales_EFP, dtype=torch.float32)
    return packed, plain


def to_fp8(state: State) -> tuple[State, State]:
    """All matrices but the router's, the token table and the head; number by number."""
    packed, plain = dict(state), dict(state)
    rows, columns = BLOCK
    for name, weight_FD in state.items():
        if not name.endswith(("proj.weight", "proj_with_mqa.weight")):
            continue
        num_rows, size = weight_FD.shape
        scales = torch.zeros(-(-num_rows // rows), -(-size // columns))
        packed[name] = torch.empty_like(weight_FD, dtype=torch.float8_e4m3fn)
        plain[name] = torch.empty_like(weight_FD)
        for q, p in ((q, p) for q in range(len(scales)) for p in range(scales.shape[1])):
            block = slice(q * rows, (q + 1) * rows), slice(p * columns, (p + 1) * columns)
            scales[q, p] = weight_FD[block].abs().max() / 448
            packed[name][block] = (weight_FD[block] / scales[q, p]).to(torch.float8_e4m3fn)
            plain[name][block] = packed[name][block].float() * scales[q, p]
        packed[f"{name}_scale_inv"] = scales
    return packed, plain


FORMS: dict[str, tuple[Variant, Packer, dict[str, Any]]] = {
    "mxfp4": (
        Variant("gpt_oss", "packed", {**VARIANTS["gpt_oss"][0], "intermediate_size": 64}),
        to_mxfp4,
        {"quant_method": "mxfp4"},
    ),
    "fp8": (
        Variant("deepseek_v3", "packed", {**VARIANTS["deepseek_v3"][0]}),
        to_fp8,
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)},
    ),
}

MIXES: dict[str, dict[str, Any]] = {
    "in memory": {"own": False, "percent": [100, 0, 100, 0, 100, 0]},
    "on disk": {"own": False, "percent": [0, 0, 0, 0, 0, 0]},
    "cut": {"own": False, "percent": [35, 0, 50, 0, 60, 0]},
    "all three tiers": {"own": True, "percent": [40, 30, 30, 40, 40, 30]},
}


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


def in_one_file(directory: Path) -> State:
    """Take all tensors out of a directory."""
    state: State = {}
    for path in sorted(directory.glob("*.safetensors")):
        state.update(load_file(path))
        path.unlink()
    (directory / "model.safetensors.index.json").unlink(missing_ok=True)
    return state


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("form", FORMS)
def test_a_packed_checkpoint_gives_the_tokens_of_its_numbers(form, mix, tmp_path):
    variant, pack, said = FORMS[form]
    make(variant, tmp_path)
    packed, plain = pack(in_one_file(tmp_path))
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    expected = as_transformers_continues(tmp_path)
    save_file(packed, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": said}))

    weights, cache, activations = Policy.splits_from_percent(MIXES[mix]["percent"])
    with contextlib.ExitStack() as stack:
        backend: Any = "cpu"
        if MIXES[mix]["own"]:
            backend = stack.enter_context(contextlib.closing(DiscreteBackend(memory_bytes=1 << 30)))
        llm = stack.enter_context(
            flexport.LLM(
                tmp_path,
                backend=backend,
                dtype="float32",
                policy=Policy(weights=weights, cache=cache, activations=activations),
                device_memory="1GiB",
                host_memory="1GiB",
                disk_memory="1GiB",
                offload_dir=tmp_path,
            )
        )
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True))

    assert [list(output.outputs[0].token_ids) for output in outputs] == expected

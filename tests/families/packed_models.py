"""Tiny models packed by the forms' own rules, and unpacked again into plain checkpoints.

Dimension key: E experts, I features in, O features out, P groups, G values of a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from packers import PACKERS, Packed, Packer
from safetensors.torch import load_file, save_file
from tiny_families import DEEPSEEK_SIZES, GPT_OSS_SIZES, GPT_SIZES, LLAMA_SIZES
from torch import Tensor

from flexport.testing.families.tiny import Variant, make

__all__ = ["CASES", "DEEPSEEK", "LLAMA", "Case", "pack"]

NUMBERS = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

GPT_OSS = Variant(
    "gpt_oss", "packed", {**GPT_OSS_SIZES, "hidden_size": 64, "intermediate_size": 32}
)
DEEPSEEK = Variant("deepseek_v3", "packed", {**DEEPSEEK_SIZES, "n_group": 4, "topk_group": 2})
LLAMA = Variant("llama", "packed", LLAMA_SIZES)
QWEN2 = Variant("qwen2", "packed", {**LLAMA_SIZES, "max_window_layers": 3})
PHI3 = Variant("phi3", "packed", LLAMA_SIZES)
MIXTRAL = Variant(
    "mixtral", "packed", {**LLAMA_SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
)
GPT2 = Variant("gpt2", "packed", GPT_SIZES)

_MATRICES = re.compile(r"(proj|experts\.\d+\.w\d|c_attn|c_fc)\.weight$")
"""What tools pack: neither token tables, nor heads, nor routers."""


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


def pack_experts(name: str, values_EIO: Tensor) -> Packed:
    """A stack of matrices in MXFP4; the numbers come as they lie in a plain checkpoint."""
    blocks, scales, plain_EIO = mxfp4_of(values_EIO)
    return Packed({f"{name}_blocks": blocks, f"{name}_scales": scales}, plain_EIO)


MXFP4 = Packer("mxfp4", {"quant_method": "mxfp4"}, pack_experts)


@dataclass(frozen=True)
class Case:
    """A model, and how its matrices are packed."""

    variant: Variant
    packer: Packer
    left: str = "nothing"
    """What part of a name says that a matrix stays as it is."""
    beside: Mapping[str, Tensor] = field(default_factory=dict)
    """What the checkpoint has, too, and nobody needs."""

    def __str__(self) -> str:
        return f"{self.variant.family}, {self.packer.name}"


CASES = [
    Case(GPT_OSS, MXFP4),
    Case(DEEPSEEK, PACKERS["fp8 in blocks of 8 x 16"]),
    Case(
        LLAMA,
        PACKERS["gptq int4:16"],
        left="layers.1.self_attn.q_proj",
        beside={
            f"model.layers.{layer}.mlp.down_proj.bias": torch.zeros(32, dtype=torch.float16)
            for layer in range(3)
        },
    ),
    Case(QWEN2, PACKERS["gptq_v2 int8:16 in act order"]),
    Case(MIXTRAL, PACKERS["gptq int4:16 in act order"]),
    Case(DEEPSEEK, PACKERS["gptq int4:16"]),
    Case(GPT2, PACKERS["gptq int4:16"]),
    Case(PHI3, PACKERS["awq int4:16"]),
    Case(MIXTRAL, PACKERS["awq int4:16"], left="layers.0.self_attn"),
    Case(
        LLAMA,
        PACKERS["packed int4:16 with zeros"],
        beside={f"model.layers.{layer}.self_attn.k_scale": torch.ones(1) for layer in range(3)},
    ),
    Case(QWEN2, PACKERS["packed int4:16 with zeros, in act order"], left="down_proj"),
    Case(MIXTRAL, PACKERS["packed int8:-1 symmetric"]),
    Case(PHI3, PACKERS["int8 with zeros"]),
    Case(LLAMA, PACKERS["fp8 by tensor in _scale"], left="layers.2"),
    Case(QWEN2, PACKERS["fp8 by rows of compressed-tensors"]),
    Case(MIXTRAL, PACKERS["fp8 by rows"]),
    Case(LLAMA, PACKERS["nvfp4-pack-quantized"]),
]


def _packed(case: Case, name: str, values: Tensor) -> Packed | None:
    """A matrix packed, with its numbers as they lie in the plain checkpoint; None if it is none."""
    if case.packer is MXFP4:
        is_stack = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        return pack_experts(name, values) if is_stack else None
    if not _MATRICES.search(name) or case.left in name:
        return None
    if case.variant is not GPT2:
        return case.packer.pack(name, values)
    turned = case.packer.pack(name, values.T.contiguous())
    return replace(turned, plain_FD=turned.plain_FD.T.contiguous())


def pack(case: Case, whole: Path, packed: Path) -> None:
    """Make the model twice: with packed tensors, and with the numbers that these stand for."""
    make(case.variant, whole)
    plain: dict[str, Tensor] = {}
    for path in whole.glob("*.safetensors"):
        plain.update(load_file(path))
    state = {**plain, **case.beside}
    for name, values in plain.items():
        own = _packed(case, name, values)
        if own is not None:
            del state[name]
            state.update(own.tensors)
            plain[name] = own.plain_FD
    config = json.loads((whole / "config.json").read_text())
    for directory, tensors in ((whole, plain), (packed, state)):
        directory.mkdir(exist_ok=True)
        for path in directory.glob("*.safetensors*"):
            path.unlink()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    quantised = {**config, "quantization_config": case.packer.config}
    (packed / "config.json").write_text(json.dumps(quantised))

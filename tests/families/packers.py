"""Matrices packed value by value, as the published forms' own definitions have it.

These are the references that the codecs are held to: slow, and without a trick.

Dimension key: F features out, D features in, G groups, W words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

__all__ = ["PACKERS", "Packed", "Packer"]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which feature of a word's eight lies in its first four bits, in its next four, …"""


@dataclass(frozen=True)
class Packed:
    """A matrix's tensors under their names, and the numbers that they stand for, (F, D)."""

    tensors: Mapping[str, Tensor]
    plain_FD: Tensor


@dataclass(frozen=True)
class Packer:
    """A form, and the quantization_config of a checkpoint that has it."""

    name: str
    config: Mapping[str, Any]
    pack: Callable[[str, Tensor], Packed]
    """Of the matrix of that name, which ends in ".weight", and its values (F, D)."""
    multiple: int = 1
    """Features in are a multiple of it."""


def _words(numbers: Sequence[Sequence[int]], bits: int, *, down: bool, awq: bool = False) -> Tensor:
    """Numbers in 32-bit words, along the first dimension if `down`, else along the second."""
    per_word = 32 // bits
    if down:
        return _words(list(zip(*numbers, strict=True)), bits, down=False).T.contiguous()
    order = AWQ_ORDER if awq else range(per_word)
    rows = []
    for row in numbers:
        padded = [*row, *[0] * (-len(row) % per_word)]
        words = []
        for first in range(0, len(padded), per_word):
            word = 0
            for place, column in enumerate(order):
                word |= padded[first + column] << (bits * place)
            words.append(word - (1 << 32) if word >> 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


@dataclass(frozen=True)
class _Quantised:
    codes: list[list[int]]
    """0 .. 2 ** bits - 1, (F, D)."""
    scales_FG: Tensor
    zeros: list[list[int]]
    """The same, (F, G)."""
    plain_FD: Tensor


def _quantised(
    values_FD: Tensor, group_of: Sequence[int], bits: int, dtype: torch.dtype, *, symmetric: bool
) -> _Quantised:
    """Whole numbers, where a value is (number - zero) * scale."""
    top = (1 << bits) - 1
    num_rows, num_groups = len(values_FD), max(group_of) + 1
    values = values_FD.tolist()
    scales_FG = torch.empty(num_rows, num_groups, dtype=dtype)
    zeros = [[0] * num_groups for _ in values]
    for f, row in enumerate(values):
        for g in range(num_groups):
            own = [value for value, group in zip(row, group_of, strict=True) if group == g]
            low, high = min(*own, 0.0), max(*own, 0.0)
            if symmetric:
                high = max(-low, high)
                low = -high
            scales_FG[f, g] = (high - low) / top
            middle = (top + 1) // 2
            zeros[f][g] = middle if symmetric else round(-low / scales_FG[f, g].item())
    codes = [
        [
            min(top, max(0, round(value / scales_FG[f, g].item()) + zeros[f][g]))
            for value, g in zip(row, group_of, strict=True)
        ]
        for f, row in enumerate(values)
    ]
    plain = [
        [
            (code - zeros[f][g]) * scales_FG[f, g].item()
            for code, g in zip(row, group_of, strict=True)
        ]
        for f, row in enumerate(codes)
    ]
    return _Quantised(codes, scales_FG, zeros, torch.tensor(plain, dtype=torch.float64).float())


def _neighbours(size: int, group: int) -> list[int]:
    return [i // (size if group == -1 else group) for i in range(size)]


def _shuffled(size: int, group: int) -> list[int]:
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size)).tolist()
    of = _neighbours(size, group)
    return [of[i] for i in order]


def gptq(
    bits: int, group: int, *, ordered: bool = False, v2: bool = False, symmetric: bool = False
) -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        stem, size = name.removesuffix(".weight"), values_FD.shape[1]
        group_of = _shuffled(size, group) if ordered else _neighbours(size, group)
        own = _quantised(values_FD, group_of, bits, torch.float16, symmetric=symmetric)
        less = 0 if v2 else 1
        zeros_GF = [
            [(zero - less) % (1 << bits) for zero in of_group]
            for of_group in zip(*own.zeros, strict=True)
        ]
        tensors = {
            f"{stem}.qweight": _words(list(zip(*own.codes, strict=True)), bits, down=True),
            f"{stem}.qzeros": _words(zeros_GF, bits, down=False),
            f"{stem}.scales": own.scales_FG.T.contiguous(),
            f"{stem}.g_idx": torch.tensor(group_of, dtype=torch.int32),
        }
        return Packed(tensors, own.plain_FD)

    stored = "gptq_v2" if v2 else "gptq"
    config = {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group,
        "desc_act": ordered,
        "sym": symmetric,
        "checkpoint_format": stored,
    }
    act_order = " in act order" if ordered else ""
    return Packer(f"{stored} int{bits}:{group}{act_order}", config, pack)


def awq(group: int) -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        stem = name.removesuffix(".weight")
        group_of = _neighbours(values_FD.shape[1], group)
        own = _quantised(values_FD, group_of, 4, torch.float16, symmetric=False)
        codes_DF, zeros_GF = (list(zip(*each, strict=True)) for each in (own.codes, own.zeros))
        tensors = {
            f"{stem}.qweight": _words(codes_DF, 4, down=False, awq=True),
            f"{stem}.qzeros": _words(zeros_GF, 4, down=False, awq=True),
            f"{stem}.scales": own.scales_FG.T.contiguous(),
        }
        return Packed(tensors, own.plain_FD)

    config = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": group,
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": ["lm_head"],
    }
    return Packer(f"awq int4:{group}", config, pack)


def _of_group(stored: str, **weights: Any) -> dict[str, Any]:
    """The config of a checkpoint of compressed-tensors with one group."""
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": stored,
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }


def packed_ints(bits: int, group: int, *, symmetric: bool, ordered: bool = False) -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        size = values_FD.shape[1]
        group_of = _shuffled(size, group) if ordered else _neighbours(size, group)
        own = _quantised(values_FD, group_of, bits, torch.bfloat16, symmetric=symmetric)
        tensors = {
            f"{name}_packed": _words(own.codes, bits, down=False),
            f"{name}_scale": own.scales_FG,
            f"{name}_shape": torch.tensor(values_FD.shape),
        }
        if not symmetric:
            tensors[f"{name}_zero_point"] = _words(own.zeros, bits, down=True)
        if ordered:
            tensors[f"{name}_g_idx"] = torch.tensor(group_of, dtype=torch.int32)
        return Packed(tensors, own.plain_FD)

    config = _of_group(
        "pack-quantized",
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group == -1 else "group",
        group_size=group,
    )
    kind = "symmetric" if symmetric else "with zeros"
    act_order = ", in act order" if ordered else ""
    return Packer(f"packed int{bits}:{group} {kind}{act_order}", config, pack)


def int8_rows(*, symmetric: bool) -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        group_of = [0] * values_FD.shape[1]
        own = _quantised(values_FD, group_of, 8, torch.bfloat16, symmetric=symmetric)
        tensors = {
            name: (torch.tensor(own.codes) - 128).to(torch.int8),
            f"{name}_scale": own.scales_FG,
            f"{name}_zero_point": (torch.tensor(own.zeros) - 128).to(torch.int8),
        }
        return Packed(tensors, own.plain_FD)

    config = _of_group("int-quantized", num_bits=8, type="int", symmetric=symmetric,
                       strategy="channel")  # fmt: skip
    return Packer(f"int8 {'symmetric' if symmetric else 'with zeros'}", config, pack)


def _fp8(values_FD: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales of their blocks, and what both stand for; a block's greatest is 448."""
    rows, columns = block
    scales = torch.empty(-(-values_FD.shape[0] // rows), -(-values_FD.shape[1] // columns))
    numbers = torch.empty_like(values_FD, dtype=torch.float8_e4m3fn)
    plain = torch.empty_like(values_FD)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            own = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            scales[i, j] = values_FD[own].abs().max() / 448
            numbers[own] = (values_FD[own] / scales[i, j]).to(torch.float8_e4m3fn)
            plain[own] = numbers[own].float() * scales[i, j]
    return numbers, scales, plain


def fp8_blocks(rows: int, columns: int) -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        numbers, scales, plain = _fp8(values_FD, (rows, columns))
        return Packed({name: numbers, f"{name}_scale_inv": scales}, plain)

    config = {"quant_method": "fp8", "weight_block_size": [rows, columns]}
    return Packer(f"fp8 in blocks of {rows} x {columns}", config, pack)


def fp8_tensor(suffix: str = "_scale") -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        numbers, scales, plain = _fp8(values_FD, (values_FD.shape[0], values_FD.shape[1]))
        beside = name.removesuffix("weight") + "input_scale"
        tensors = {name: numbers, name + suffix: scales.view(()), beside: torch.tensor(0.5)}
        return Packed(tensors, plain)

    config = {"quant_method": "fp8", "activation_scheme": "static"}
    return Packer(f"fp8 by tensor in {suffix}", config, pack)


def fp8_rows() -> Packer:
    def pack(name: str, values_FD: Tensor) -> Packed:
        numbers, scales, plain = _fp8(values_FD, (1, values_FD.shape[1]))
        return Packed({name: numbers, f"{name}_scale": scales}, plain)

    return Packer("fp8 by rows", {"quant_method": "fbgemm_fp8"}, pack)


SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Of floats of four bits; eight more are below 0."""


def float4(stored: str, group: int) -> Packer:
    """With scales that are powers of two for "mxfp4", float8 with a common divisor for "nvfp4"."""
    is_mx = stored.startswith("mxfp4")

    def pack(name: str, values_FD: Tensor) -> Packed:
        size, divisor = values_FD.shape[1], 100.0
        numbers, scale_bytes, plain = [], [], []
        for row in values_FD.tolist():
            nibbles, of_groups = [], []
            for first in range(0, size, group):
                own = row[first : first + group]
                wanted = max(abs(value) for value in own) / 6
                if is_mx:
                    power = math.ceil(math.log2(wanted))
                    byte, scale = power + 127, 2.0**power
                else:
                    rounded = torch.tensor(wanted * divisor).to(torch.float8_e4m3fn)
                    byte = int(rounded.view(torch.uint8))
                    scale = (rounded.float() / torch.tensor(divisor)).item()
                of_groups.append(byte)
                for value in own:
                    near = min(range(8), key=lambda i: abs(SIZES[i] * scale - abs(value)))
                    nibbles.append(near + 8 * (value < 0))
                    plain.append(math.copysign(SIZES[near] * scale, value))
            pairs = zip(nibbles[::2], nibbles[1::2], strict=True)
            numbers.append([low + 16 * high for low, high in pairs])
            scale_bytes.append(of_groups)
        scales = torch.tensor(scale_bytes, dtype=torch.uint8)
        tensors = {
            f"{name}_packed": torch.tensor(numbers, dtype=torch.uint8),
            f"{name}_scale": scales if is_mx else scales.view(torch.float8_e4m3fn),
        }
        if not is_mx:
            tensors[f"{name}_global_scale"] = torch.tensor([divisor])
        return Packed(tensors, torch.tensor(plain, dtype=torch.float64).float().view(-1, size))

    config = _of_group(stored, num_bits=4, type="float", symmetric=True, group_size=group,
                       strategy="group" if is_mx else "tensor_group")  # fmt: skip
    return Packer(stored, config, pack, multiple=group)


def _in_config(packer: Packer, config: Mapping[str, Any]) -> Packer:
    return replace(packer, name=f"{packer.name} of compressed-tensors", config=config)


PACKERS: Mapping[str, Packer] = {
    packer.name: packer
    for packer in (
        gptq(4, 16),
        gptq(4, 8),
        gptq(4, 16, ordered=True, symmetric=True),
        gptq(4, -1, v2=True),
        gptq(8, 16, v2=True, ordered=True),
        gptq(2, 8, v2=True),
        gptq(4, 12, v2=True),
        awq(16),
        awq(-1),
        packed_ints(4, 16, symmetric=True),
        packed_ints(4, 16, symmetric=False),
        packed_ints(4, 16, symmetric=False, ordered=True),
        packed_ints(8, -1, symmetric=True),
        packed_ints(2, 8, symmetric=False),
        int8_rows(symmetric=True),
        int8_rows(symmetric=False),
        fp8_blocks(8, 16),
        fp8_tensor(),
        fp8_tensor("_scale_inv"),
        fp8_rows(),
        float4("mxfp4-pack-quantized", 32),
        float4("nvfp4-pack-quantized", 16),
        _in_config(
            fp8_rows(), _of_group("float-quantized", num_bits=8, type="float", strategy="channel")
        ),
    )
}
"""By name."""

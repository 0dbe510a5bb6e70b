"""What the package compressed-tensors packs, we decode to the bits that it decodes to."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from flexport.codecs.published import formats_of
from flexport.records import FileTensor

SIZE = (32, 128)

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "int4, groups": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
    "int4, groups with zeros": (
        "pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    ),
    "int2, groups": ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": 32}),
    "int8, rows with zeros": (
        "pack-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8 bytes, rows": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
    "int8 bytes, rows with zeros": (
        "int-quantized",
        {"num_bits": 8, "strategy": "channel", "symmetric": False},
    ),
    "int8 bytes, one scale": ("naive-quantized", {"num_bits": 8, "strategy": "tensor"}),
    "fp8, rows": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": 32,
            "scale_dtype": torch.uint8,
        },
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            "num_bits": 4,
            "type": "float",
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
    "fp8, blocks": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 32]},
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_are_what_their_own_package_reads(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.utils import calculate_qparams

        stored, fields = SCHEMES[name]
        arguments = QuantizationArgs(**fields)
        scheme = QuantizationScheme(targets=["Linear"], weights=arguments)
        weight_FD = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).bfloat16()
        low, high = _extremes(weight_FD, arguments)
        of_all = torch.tensor([512.0]) if stored.startswith("nvfp4") else None
        scale, zero_point = calculate_qparams(low, high, arguments, of_all)
        compressor = BaseCompressor.get_value_from_registry(stored)
        local = {"weight": weight_FD, "weight_scale": scale.bfloat16(),
                 "weight_zero_point": zero_point}  # fmt: skip
        if of_all is not None:
            local["weight_global_scale"] = of_all
        packed = compressor.compress(local, scheme)
        theirs_FD = compressor.decompress(packed, scheme)["weight"].bfloat16()
        config = {
            "quant_method": "compressed-tensors",
            "format": stored,
            "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        }

    files = {
        tensor_name: FileTensor(
            name=tensor_name, dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape), path=Path("nowhere"), offset_bytes=0,
            num_bytes=tensor.nbytes,
        )
        for tensor_name, tensor in packed.items()
    }  # fmt: skip
    (form,) = formats_of({"quantization_config": config})
    layout = form.layout("weight", SIZE, files)
    assert layout is not None
    assert [files[part.name].shape for part in layout.parts] == [p.shape for p in layout.parts]
    parts = [packed[part.name] for part in layout.parts]
    ours_FD = form.decode(parts, torch.empty(SIZE, dtype=torch.bfloat16), 0)

    assert torch.equal(ours_FD, theirs_FD)
    unread = set(packed) - {part.name for part in layout.parts}
    assert all(f".{each}".endswith(form.unused) for each in unread)


def _extremes(weight_FD: torch.Tensor, arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of what shares a scale, the least and the greatest value."""
    rows, size = SIZE
    block = {
        "tensor": SIZE,
        "channel": (1, size),
        "group": (1, arguments.group_size or size),
        "tensor_group": (1, arguments.group_size or size),
        "block": tuple(arguments.block_structure or SIZE),
    }[str(arguments.strategy)]
    blocks = weight_FD.view(rows // block[0], block[0], size // block[1], block[1])
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    return (low.view(1), high.view(1)) if arguments.strategy == "tensor" else (low, high)

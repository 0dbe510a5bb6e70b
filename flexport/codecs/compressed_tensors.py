"""Which packed forms the config groups of compressed-tensors ask for.

Of the activations nothing is read: they stay in the dtype that is computed in. Source: the
documentation of compressed-tensors, and the configs that llm-compressor writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.codecs.forms import Mxfp4, Nvfp4, PackedInts, Scaled
from flexport.codecs.layout import Format
from flexport.errors import UnsupportedModel

__all__ = ["formats_of_groups"]

_FOUR_BITS: Mapping[str, Format] = {
    "mxfp4-pack-quantized": Mxfp4(of_gpt_oss=False),
    "nvfp4-pack-quantized": Nvfp4(),
}

_BYTES = ("int-quantized", "float-quantized", "naive-quantized")


def formats_of_groups(asked: Mapping[str, Any]) -> tuple[Format, ...]:
    """The forms of a quantization_config with these fields, in its order, each once.

    Raises UnsupportedModel, naming what flexport can't decode.
    """
    if asked.get("transform_config"):
        raise _unsupported("transform_config", "set", "none")
    sparsity = (asked.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _unsupported("sparsity_config: format", sparsity, "dense")
    found: dict[Format, None] = {}
    for name, scheme in (asked.get("config_groups") or {}).items():
        if not isinstance(scheme, Mapping):
            raise _unsupported(f"config_groups: {name}", scheme, "a scheme written out")
        weights = scheme.get("weights")
        if weights:
            stored = scheme.get("format") or asked.get("format")
            found[_format(f"config_groups: {name}", str(stored), weights)] = None
    return tuple(found)


def _format(where: str, stored: str, weights: Mapping[str, Any]) -> Format:
    bits, kind = weights.get("num_bits", 8), str(weights.get("type", "int")).lower()
    strategy, group = weights.get("strategy"), weights.get("group_size")
    symmetric = bool(weights.get("symmetric", True))
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(group, "group")
    if stored == "pack-quantized":
        if kind != "int" or bits not in (2, 4, 8):
            raise _unsupported(where, f"{bits}-bit {kind}", "int of 2, 4 or 8 bits")
        if strategy not in ("group", "channel"):
            raise _unsupported(f"{where}: strategy", strategy, "group and channel")
        of_group = int(weights["group_size"]) if strategy == "group" else None
        return PackedInts(bits=bits, group=of_group, symmetric=symmetric)
    if stored in _BYTES:
        if bits != 8 or kind not in ("int", "float"):
            raise _unsupported(where, f"{bits}-bit {kind}", "int and float of 8 bits")
        block: tuple[int, int] | None = None
        if strategy == "block":
            rows, features = weights["block_structure"]
            block = int(rows), int(features)
        elif strategy == "group":
            block = 1, int(weights["group_size"])
        elif strategy not in ("tensor", "channel"):
            raise _unsupported(f"{where}: strategy", strategy, "tensor, channel, group and block")
        return Scaled(
            dtype="int8" if kind == "int" else "float8_e4m3fn",
            suffix="_scale",
            block=block,
            symmetric=symmetric,
        )
    if stored in _FOUR_BITS:
        return _FOUR_BITS[stored]
    able = ", ".join(("pack-quantized", *_BYTES, *_FOUR_BITS))
    raise _unsupported(f"{where}: format", stored, able)


def _unsupported(field: str, value: object, able: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"quantization_config: {field} is {value!r}; what flexport can decode is {able}"
    )

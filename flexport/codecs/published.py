"""The packed forms that published checkpoints have, by what their config says.

Torch is not imported here; a form's kernels are, when something is decoded.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flexport.codecs.layout import Format, Layout, Part
from flexport.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Fp8Blocks", "Mxfp4", "format_of"]


def format_of(config: Mapping[str, Any]) -> Format | None:
    """How a checkpoint with this config.json packs matrices; None if it does not.

    Raises UnsupportedModel, naming what flexport can't decode.
    """
    asked = config.get("quantization_config")
    if not asked:
        return None
    method = asked.get("quant_method")
    if method == "mxfp4":
        return Mxfp4()
    if method == "fp8" and asked.get("weight_block_size"):
        rows, columns = asked["weight_block_size"]
        return Fp8Blocks(block=(rows, columns))
    raise UnsupportedModel(
        f"quantization_config: quant_method is {method!r}; flexport can run plain weights, mxfp4, "
        "and fp8 with a weight_block_size"
    )


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Four bits a number, 32 of which share a power of two; see `codecs.mxfp4`."""

    name = "mxfp4"

    def layout(
        self, name: str, shape: tuple[int, int], names: Container[str], *, transposed: bool = False
    ) -> Layout | None:
        """Blocks and scales, always as (features out, features in)."""
        if f"{name}_blocks" not in names:
            return None
        rows, size = shape[::-1] if transposed else shape
        groups, uint8 = size // 32, frozenset({"uint8"})
        return Layout(
            parts=(
                Part(name=f"{name}_blocks", shape=(rows, groups, 16), dtypes=uint8),
                Part(name=f"{name}_scales", shape=(rows, groups), dtypes=uint8),
            ),
            shape=(rows, size),
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import mxfp4

        blocks_RPB, scales_RP = parts
        return mxfp4.decode(blocks_RPB, scales_RP, out_RD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Blocks:
    """A byte a number, and a scale for each block of rows and features; see `codecs.fp8`."""

    block: tuple[int, int]
    """Rows and features that share a scale."""
    name = "fp8"

    def layout(
        self, name: str, shape: tuple[int, int], names: Container[str], *, transposed: bool = False
    ) -> Layout | None:
        """Numbers, and the scales that they are multiplied by."""
        if f"{name}_scale_inv" not in names:
            return None
        rows, features = self.block
        lines = (-(-shape[0] // rows), -(-shape[1] // features))
        return Layout(
            parts=(
                Part(name=name, shape=shape, dtypes=frozenset({"float8_e4m3fn"})),
                Part(name=f"{name}_scale_inv", shape=lines, rows_per_line=rows),
            ),
            shape=shape,
            transposed=transposed,
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import fp8

        numbers_RD, scales = parts
        return fp8.decode_blocks(numbers_RD, scales, out_RD, block=self.block, begin=begin)

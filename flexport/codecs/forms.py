"""The packed forms that published checkpoints have, a record each.

Torch is not imported here; a form's kernels are, when something is decoded.

Dimension key: R rows, D features, F features out, W words, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from flexport.codecs.layout import Known, Layout, Part
from flexport.records import FileTensor

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Awq", "Gptq", "Mxfp4", "Nvfp4", "PackedInts", "Scaled"]

_INT32 = frozenset({"int32"})

_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".activation_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)
"""Scales of hidden states, queries and cache. Here these stay in the dtype that is computed in."""

_Names = Mapping[str, FileTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mxfp4:
    """Floats of four bits, 32 of which share a power of two; see `codecs.floats`.

    gpt-oss calls them blocks and scales, compressed-tensors packed and scale.
    """

    of_gpt_oss: bool = True
    name = "mxfp4"
    unused = _OF_ACTIVATIONS

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Numbers and scales, always as (features out, features in)."""
        rows, size = shape[::-1] if transposed else shape
        groups, uint8 = size // 32, frozenset({"uint8"})
        numbers, scales = f"{name}_packed", f"{name}_scale"
        numbers_shape: tuple[int, ...] = (rows, size // 2)
        if self.of_gpt_oss:
            numbers, scales = f"{name}_blocks", f"{name}_scales"
            numbers_shape = (rows, groups, 16)
        if numbers not in names:
            return None
        return Layout(
            parts=(
                Part(name=numbers, shape=numbers_shape, dtypes=uint8),
                Part(name=scales, shape=(rows, groups), dtypes=uint8),
            ),
            shape=(rows, size),
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import floats, groups

        numbers_RB, scales_RP = parts[0].flatten(1), floats.powers_of_two(parts[1])

        def fill(rows: slice, with_RD: Tensor) -> None:
            floats.fill_float4(numbers_RB[rows], with_RD)

        return groups.by_features(fill, scales_RP, None, out_RD, block=(1, 32))


@dataclass(frozen=True, slots=True)
class Nvfp4:
    """Floats of four bits, 16 of which share a float8 scale, and all a divisor of these scales.

    compressed-tensors' "nvfp4-pack-quantized". Source: its documentation, and `codecs.floats`.
    """

    name = "nvfp4"
    unused = _OF_ACTIVATIONS

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Numbers, scales and the divisor, always as (features out, features in)."""
        if f"{name}_packed" not in names:
            return None
        rows, size = shape[::-1] if transposed else shape
        uint8, float8 = frozenset({"uint8"}), frozenset({"float8_e4m3fn"})
        return Layout(
            parts=(
                Part(name=f"{name}_packed", shape=(rows, size // 2), dtypes=uint8),
                Part(name=f"{name}_scale", shape=(rows, size // 16), dtypes=float8),
                Part(name=f"{name}_global_scale", shape=(1,), rows_per_line=0),
            ),
            shape=(rows, size),
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import floats, groups

        numbers_RB, scales_RP, divisor_1 = parts

        def fill(rows: slice, with_RD: Tensor) -> None:
            floats.fill_float4(numbers_RB[rows], with_RD)

        return groups.by_features(
            fill, scales_RP.float() / divisor_1.float(), None, out_RD, block=(1, 16)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """A byte a number, times a scale: one for all, one a row, or one a block.

    Source: arXiv:2412.19437, section 3.3.2, for blocks of 128 x 128, whose checkpoint calls the
    scales weight_scale_inv; the documentation of compressed-tensors for the others.
    """

    dtype: Literal["float8_e4m3fn", "int8"]
    suffix: str
    """What a matrix's name has behind it in that of its scales."""
    block: tuple[int, int] | None = None
    """Rows and features that share a scale; None: all of them do, or those of a row."""
    symmetric: bool = True
    """There are no zeros."""
    unused = _OF_ACTIVATIONS

    @property
    def name(self) -> str:
        """For people."""
        return "fp8" if self.dtype == "float8_e4m3fn" else "int8"

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Numbers, the scales that they are multiplied by, and what is taken from them before."""
        scales = names.get(name + self.suffix)
        if name not in names or scales is None:
            return None
        rows_per_line, lines = self._lines(shape, scales.shape)
        numbers = Part(name=name, shape=shape, dtypes=frozenset({self.dtype}))
        parts = [numbers, Part(name=scales.name, shape=lines, rows_per_line=rows_per_line)]
        known = []
        zeros = f"{name}_zero_point"
        if not self.symmetric:
            int8 = frozenset({"int8"})
            parts.append(Part(name=zeros, shape=lines, dtypes=int8, rows_per_line=rows_per_line))
        elif zeros in names:
            known.append(Known(name=zeros))
        return Layout(parts=tuple(parts), shape=shape, transposed=transposed, known=tuple(known))

    def _lines(self, shape: tuple[int, int], found: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        """Rows of a line of scales, and their shape, given the one in the file."""
        if self.block is not None:
            rows, features = self.block
            return rows, (-(-shape[0] // rows), -(-shape[1] // features))
        if found in ((), (1,), (1, 1)):
            return 0, found
        return 1, found if found == shape[:1] else (shape[0], 1)

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import floats, groups

        numbers_RD, *others = parts
        if self.block is None:
            others = [each.reshape(-1, 1).expand(len(out_RD), 1) for each in others]
        scales, *zeros = others

        def fill(rows: slice, with_RD: Tensor) -> None:
            if self.dtype == "int8":
                with_RD.copy_(numbers_RD[rows])
            else:
                floats.fill_float8(numbers_RD[rows], with_RD)

        return groups.by_features(
            fill,
            scales,
            zeros[0] if zeros else None,
            out_RD,
            block=self.block or (1, out_RD.shape[1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedInts:
    """compressed-tensors' "pack-quantized": whole numbers in 32-bit words along features.

    A value is (number - zero) * scale, by groups of a row's features. Both numbers and zeros are
    stored with 2 ** (bits - 1) added; zeros in words along rows. Source: the documentation of
    compressed-tensors.
    """

    bits: Literal[2, 4, 8]
    group: int | None
    """Features of a row that share a scale; None: all of them."""
    symmetric: bool = True
    """There are no zeros."""
    unused = (*_OF_ACTIVATIONS, ".weight_shape")

    @property
    def name(self) -> str:
        """For people."""
        return f"packed int{self.bits}"

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Words and scales, always as (features out, features in)."""
        if f"{name}_packed" not in names:
            return None
        rows, size = shape[::-1] if transposed else shape
        groups, per_word = -(-size // (self.group or size)), 32 // self.bits
        parts = [
            Part(name=f"{name}_packed", shape=(rows, -(-size // per_word)), dtypes=_INT32),
            Part(name=f"{name}_scale", shape=(rows, groups)),
        ]
        if not self.symmetric:
            zeros_shape = (-(-rows // per_word), groups)
            zeros = Part(
                name=f"{name}_zero_point",
                shape=zeros_shape,
                dtypes=_INT32,
                rows_per_line=per_word,
            )
            parts.append(zeros)
        known = []
        order = names.get(f"{name}_g_idx")
        if order is not None and 0 in order.shape:
            known.append(Known(name=order.name))
        elif order is not None:
            parts.append(Part(name=order.name, shape=(size,), dtypes=_INT32, rows_per_line=0))
        return Layout(parts=tuple(parts), shape=(rows, size), known=tuple(known))

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        import torch

        from flexport.codecs import groups, words

        words_RW, scales_RG, *others = parts
        size = out_RD.shape[1]
        middle = 2 ** (self.bits - 1)
        zeros_RG = torch.full_like(scales_RG[:1, :1], middle).expand_as(scales_RG)
        if not self.symmetric:
            zeros_RG = torch.empty_like(scales_RG, dtype=torch.float32)
            words.along_rows(others.pop(0), self.bits, zeros_RG)

        def fill(rows: slice, with_RD: Tensor) -> None:
            with_RD.copy_(words.along_features(words_RW[rows], self.bits)[:, :size])

        return groups.by_features(
            fill,
            scales_RG,
            zeros_RG,
            out_RD,
            block=(1, self.group or size),
            index_D=others[0] if others else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """GPTQ's whole numbers, in 32-bit words along rows, which are features in.

    A value is (number - zero) * scale, by groups of rows: of neighbours, or in act order of those
    that g_idx gives to it. Source: arXiv:2210.17323, and how AutoGPTQ and GPTQModel store it. Their
    first version stores zeros less 1, where 0 becomes the largest number.
    """

    bits: Literal[2, 4, 8]
    group: int | None
    """Rows that share scales and zeros; None: all of them."""
    ordered: bool
    """Rows belong to groups by g_idx."""
    zeros_less_one: bool
    unused = ()

    @property
    def name(self) -> str:
        """For people."""
        return f"gptq int{self.bits}"

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Words, zeros and scales, always as (features in, features out)."""
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" not in names:
            return None
        rows, features = shape if transposed else shape[::-1]
        group, per_word = self.group or rows, 32 // self.bits
        groups = -(-rows // group)
        bias, order = names.get(f"{stem}.bias"), names.get(f"{stem}.g_idx")
        # Some tools give every matrix a bias, of zeros where the model has none.
        known = [Known(name=bias.name)] if bias is not None else []
        rows_per_line = group if groups > 1 else 0
        own: list[Part] = []
        if self.ordered:
            rows_per_line = 0
            own.append(Part(name=f"{stem}.g_idx", shape=(rows,), dtypes=_INT32))
        elif order is not None:
            known.append(Known(name=order.name, group=group if order.shape != (0,) else None))
        return Layout(
            parts=(
                Part(
                    name=f"{stem}.qweight",
                    shape=(-(-rows // per_word), features),
                    dtypes=_INT32,
                    rows_per_line=per_word,
                ),
                *_zeros_and_scales(stem, groups, features, per_word, rows_per_line),
                *own,
            ),
            shape=(rows, features),
            transposed=True,
            known=tuple(known),
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import groups, words

        words_WF, zeros_GW, scales_GF, *order = parts
        zeros_GF = words.along_features(zeros_GW, self.bits)[:, : out_RD.shape[1]]
        if self.zeros_less_one:
            zeros_GF = zeros_GF.add(1).bitwise_and_((1 << self.bits) - 1)
        per_word = 32 // self.bits

        def fill(rows: slice, with_RF: Tensor) -> None:
            of_rows = slice(rows.start // per_word, -(-rows.stop // per_word))
            words.along_rows(words_WF[of_rows], self.bits, with_RF)

        return groups.by_rows(
            fill,
            scales_GF,
            zeros_GF,
            out_RD,
            group=self.group or len(out_RD),
            unit=per_word,
            index_R=order[0] if order else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """AWQ's whole numbers of four bits, in 32-bit words along features; rows are features in.

    A value is (number - zero) * scale, by groups of neighbouring rows. Source: arXiv:2306.00978,
    and how AutoAWQ stores its version "gemm".
    """

    group: int | None
    """Rows that share scales and zeros; None: all of them."""
    name = "awq int4"
    unused = ()

    def layout(
        self, name: str, shape: tuple[int, int], names: _Names, *, transposed: bool = False
    ) -> Layout | None:
        """Words, zeros and scales, always as (features in, features out)."""
        stem = name.removesuffix(".weight")
        if f"{stem}.qweight" not in names:
            return None
        rows, features = shape if transposed else shape[::-1]
        groups = -(-rows // (self.group or rows))
        rows_per_line = (self.group or rows) if groups > 1 else 0
        bias = names.get(f"{stem}.bias")
        return Layout(
            parts=(
                Part(name=f"{stem}.qweight", shape=(rows, -(-features // 8)), dtypes=_INT32),
                *_zeros_and_scales(stem, groups, features, 8, rows_per_line),
            ),
            shape=(rows, features),
            transposed=True,
            known=() if bias is None else (Known(name=bias.name),),
        )

    def decode(self, parts: Sequence[Tensor], out_RD: Tensor, begin: int) -> Tensor:
        """See `Format`."""
        from flexport.codecs import groups, words

        words_RW, zeros_GW, scales_GF = parts
        features = out_RD.shape[1]

        def fill(rows: slice, with_RF: Tensor) -> None:
            with_RF.copy_(words.along_features_of_awq(words_RW[rows])[:, :features])

        return groups.by_rows(
            fill,
            scales_GF,
            words.along_features_of_awq(zeros_GW)[:, :features],
            out_RD,
            group=self.group or len(out_RD),
        )


def _zeros_and_scales(
    stem: str, groups: int, features: int, per_word: int, rows_per_line: int
) -> tuple[Part, Part]:
    """As GPTQ and AWQ have them, by groups of rows."""
    words = -(-features // per_word)
    return (
        Part(
            name=f"{stem}.qzeros",
            shape=(groups, words),
            dtypes=_INT32,
            rows_per_line=rows_per_line,
        ),
        Part(name=f"{stem}.scales", shape=(groups, features), rows_per_line=rows_per_line),
    )

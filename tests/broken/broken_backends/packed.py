"""Backends that multiply wrongly with packed matrices; and a right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import breaks
from flexport.backend import PackedMatrix


def in_8_bits(x_TD: Tensor) -> Tensor:
    """Each token in 127 steps up to its largest feature; NaN where that is infinite."""
    steps_T1 = x_TD.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (x_TD / steps_T1).round() * steps_T1


class MultipliesPackedBread(ToasterBackend):
    """A toaster that multiplies with packed matrices; right as it is."""

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return form in ("int8", "int4")

    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        return replace(matrix, parts=tuple(part.clone() for part in matrix.parts))

    def matmul_packed(
        self, x_TD: Tensor, matrices: Sequence[PackedMatrix], biases_F: Sequence[Any]
    ) -> list[Tensor]:
        seen_TD = x_TD if x_TD.dtype is torch.float32 else self.rounded(x_TD.float())
        products = [self.matmul(seen_TD, self.values(matrix)) for matrix in matrices]
        return [
            (product_TF if bias_F is None else product_TF + bias_F).to(x_TD.dtype)
            for product_TF, bias_F in zip(products, biases_F, strict=True)
        ]

    def rounded(self, x_TD: Tensor) -> Tensor:
        """What a product in a narrow dtype sees: 8 bits, and 8 of what they leave."""
        return in_8_bits(x_TD) + in_8_bits(x_TD - in_8_bits(x_TD))

    def values(self, matrix: PackedMatrix) -> Tensor:
        codes, scales = matrix.parts
        if matrix.form == "int8":
            return codes * scales[:, None]
        codes_FD = torch.cat([codes & 15, codes >> 4], 2).transpose(1, 2).flatten(0, 1).float() - 8
        pairs_FG2 = scales.float().transpose(1, 2).flatten(0, 1)
        scales_FD, zeros_FD = pairs_FG2.repeat_interleave(matrix.group, 1).unbind(-1)
        num_out, num_in = matrix.shape
        return (codes_FD * scales_FD[:, :num_in] + zeros_FD[:, :num_in])[:num_out]


PACKED_ACCURATE = "test_a_product_with_a_packed_matrix_is_accurate"


@breaks(PACKED_ACCURATE)
class RoundsInFloat32Too(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return [out.to(x_TD.dtype) for out in super().matmul_packed(x_TD.half(), *others)]


@breaks(PACKED_ACCURATE)
class SwapsTheHalves(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        codes, scales = matrix.parts
        swapped = codes << 4 | codes >> 4 if matrix.form == "int4" else codes
        return super().values(replace(matrix, parts=(swapped, scales)))


@breaks(PACKED_ACCURATE)
class LeavesOutTheShorterGroup(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        values_FD = super().values(matrix)
        values_FD[:, matrix.shape[1] // (matrix.group or 1) * (matrix.group or 1) :] = 0
        return values_FD


@breaks(PACKED_ACCURATE)
class GivesRowsOfNothingNoWeight(MultipliesPackedBread):
    """Multiplies what belongs to nothing by zero."""

    def values(self, matrix: PackedMatrix) -> Tensor:
        return super().values(matrix) + 0 * matrix.parts[1].sum()


@breaks("test_a_product_with_a_packed_matrix_takes_views")
class IgnoresStridesOfPackedX(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD.as_strided(x_TD.shape, (x_TD.shape[1], 1)), *others)


@breaks("test_a_token_with_one_huge_feature_is_as_accurate_as_others")
class RoundsOnce(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        return in_8_bits(x_TD)


@breaks("test_a_token_of_zeros_gives_the_bias")
class DividesByTheLargest(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        largest_T1 = x_TD.abs().amax(1, keepdim=True)
        return super().rounded(x_TD / largest_T1) * largest_T1


@breaks("test_a_tokens_packed_product_does_not_depend_on_its_neighbours")
class RoundsAllTokensAlike(MultipliesPackedBread):
    def rounded(self, x_TD: Tensor) -> Tensor:
        return in_8_bits(x_TD.reshape(1, -1)).view_as(x_TD)


@breaks("test_packed_matrices_together_give_what_each_gives_alone")
class AddsTheFirstBiasAlone(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, matrices: Any, biases_F: Any) -> list[Tensor]:
        biases_F = [biases_F[0], *[None] * (len(matrices) - 1)]
        return super().matmul_packed(x_TD, matrices, biases_F)


@breaks("test_a_settled_matrix_gives_what_it_gave_unsettled")
class SettlesWithRoundedScales(MultipliesPackedBread):
    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        codes, scales = matrix.parts
        return replace(matrix, parts=(codes.clone(), scales.bfloat16().to(scales.dtype)))


@breaks("test_a_settled_matrix_takes_any_number_of_tokens")
class SettlesForSteps(MultipliesPackedBread):
    """It would decode for more tokens than that, which it does not say where it settles."""

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return super().multiplies(form, dtype, num_tokens) and num_tokens <= 64

    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        if len(x_TD) > 64:
            raise RuntimeError("more than 64 tokens are not implemented")
        return super().matmul_packed(x_TD, *others)


@breaks("test_a_settled_matrix_has_memory_of_its_own")
class SettlesWhereItLies(MultipliesPackedBread):
    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        return matrix


@breaks("test_a_token_that_is_not_finite_spoils_its_own_packed_product_alone")
class HidesWhatIsNotFinite(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD.nan_to_num(), *others)


@breaks("test_a_token_that_is_not_finite_spoils_its_own_packed_product_alone")
class LooksForTheLargestOfAll(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        return super().matmul_packed(x_TD + 0 * x_TD.max(), *others)


@breaks("test_a_packed_product_leaves_its_arguments_as_they_were")
class UnpacksInPlace(MultipliesPackedBread):
    def values(self, matrix: PackedMatrix) -> Tensor:
        values_FD = super().values(matrix)
        matrix.parts[0].zero_()
        return values_FD


@breaks("test_every_packed_product_has_memory_of_its_own")
class HasOnePackedProduct(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        kept = self.__dict__.setdefault("kept", {})
        results = super().matmul_packed(x_TD, *others)
        return [kept.setdefault((out.shape, out.dtype), out).copy_(out) for out in results]


@breaks("test_packed_products_work_in_inference_mode_and_then_outside_it")
class RoundsIntoABufferOfInferenceMode(MultipliesPackedBread):
    def matmul_packed(self, x_TD: Tensor, *others: Any) -> list[Tensor]:
        buffer_TD = self.__dict__.setdefault("buffers", {}).setdefault(
            x_TD.dtype, torch.empty_like(x_TD)
        )
        return super().matmul_packed(buffer_TD.copy_(x_TD), *others)


@breaks("test_a_form_that_nobody_knows_is_not_multiplied")
class MultipliesWhateverComes(MultipliesPackedBread):
    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        return True

"""Backends that multiply wrongly, or change what they are given."""

from __future__ import annotations

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import breaks


@breaks("test_every_product_has_memory_of_its_own")
class HasOneResult(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        scratch = self.__dict__.setdefault("scratch", {})
        kept: Tensor = scratch.setdefault(out_TF.shape, out_TF)
        return kept.copy_(out_TF)


@breaks(
    "test_matmul_is_accurate",
    "test_products_accumulate_in_float32_or_better",
)
class RoundsItsSums(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = torch.zeros(x_TD.shape[0], weight_FD.shape[0], dtype=torch.bfloat16)
        for x_Td, weight_Fd in zip(x_TD.split(32, 1), weight_FD.split(32, 1), strict=True):
            out_TF += x_Td @ weight_Fd.T
        return out_TF.float() if bias_F is None else out_TF.float() + bias_F


@breaks("test_a_row_that_is_not_finite_spoils_itself_alone")
class ScalesAllRowsTogether(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        scale = x_TD.abs().max() if x_TD.numel() else 1.0
        return super().matmul(x_TD / scale, weight_FD) * scale + (0 if bias_F is None else bias_F)


@breaks(
    "test_matmul_takes_views_of_larger_tensors",
    "test_matmul_takes_rows_that_are_columns_in_memory",
    "test_matmul_takes_every_other_row",
)
class IgnoresStridesOfX(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        return super().matmul(x_TD.as_strided(x_TD.shape, (x_TD.shape[1], 1)), weight_FD, bias_F)


@breaks("test_matmul_leaves_its_arguments_as_they_were")
class AddsTheBiasInPlace(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        x_TD.mul_(2)
        return out_TF


@breaks("test_a_product_takes_its_operands_as_they_are_when_it_is_issued")
class RemembersWeightsByAddress(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        packed = self.__dict__.setdefault("packed", {})
        kept_FD = packed.setdefault(weight_FD.data_ptr(), weight_FD.clone())
        return super().matmul(x_TD, kept_FD, bias_F)


class Packs(ToasterBackend):
    """A toaster that packs weights; right as it is."""

    def pack(self, weight_FD: Tensor) -> Tensor:
        return weight_FD.clone()


@breaks("test_matmul_on_a_packed_weight_is_accurate")
class PacksInPlace(Packs):
    def pack(self, weight_FD: Tensor) -> Tensor:
        torch.as_strided(weight_FD, (weight_FD.numel(),), (1,)).mul_(2)
        return weight_FD


@breaks("test_a_packed_weight_may_have_been_a_view")
class PacksFromTheBeginningOfMemory(Packs):
    def pack(self, weight_FD: Tensor) -> Tensor:
        return weight_FD.as_strided(weight_FD.shape, weight_FD.stride(), 0).clone()


@breaks("test_the_features_of_a_result_can_be_cut_into_heads")
class AddsAColumn(ToasterBackend):
    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        out_TF = super().matmul(x_TD, weight_FD, bias_F)
        return torch.cat([out_TF, out_TF[:, :1]], 1)

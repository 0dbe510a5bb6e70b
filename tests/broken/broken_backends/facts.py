"""Backends that say of themselves what is not so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from flexport_emulated.backend import EmulatedBackend
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import breaks
from flexport.backend import Capabilities


@breaks("test_capabilities_do_not_change_with_what_is_done")
class SaysWhatIsFreeNow(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, memory_bytes=self._free_bytes)


@breaks("test_capabilities_can_be_written_to_a_report_and_be_a_key")
class SaysAList(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        dtypes: Any = ["float32"]
        return replace(self._capabilities, dtypes=dtypes)


@breaks("test_capabilities_are_plain_facts_that_do_not_change")
class SaysTheSameDtypeTwice(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, dtypes=("float32", "float32"))


@breaks("test_only_a_device_that_shares_the_hosts_tensors_is_addressable")
class SaysThatTheHostMayRead(EmulatedBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, addressable=True)


@breaks("test_every_dtype_that_is_listed_computes")
class ListsADtypeWithoutAKernel(ToasterBackend):
    @property
    def capabilities(self) -> Capabilities:
        return replace(self._capabilities, dtypes=("float32", "float16"))

    def attention(self, q_NHLE: Tensor, *others: Any) -> Tensor:
        if q_NHLE.dtype is torch.float16:
            raise RuntimeError("not implemented for 'Half'")
        return super().attention(q_NHLE, *others)


@breaks("test_pages_of_the_width_it_likes_best_are_taken")
class HasNoKernelForItsOwnPages(ToasterBackend):
    def attention(self, q_NHLE: Tensor, keys: Sequence[Tensor], *others: Any) -> Tensor:
        if any(page.shape[2] == self.capabilities.page_tokens for page in keys):
            raise RuntimeError("pages of 16 columns are not implemented")
        return super().attention(q_NHLE, keys, *others)

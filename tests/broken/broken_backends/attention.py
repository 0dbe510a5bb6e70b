"""Backends whose attention leaves something out of account."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from flexport_toaster.backend import ToasterBackend
from torch import Tensor

from broken_backends.parts import breaks
from flexport.backend import AttentionSpec


class Attends(ToasterBackend):
    """A toaster with something to do around its attention; right as it is."""

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        keys, values = list(keys_NKGE), list(values_NKGE)
        q_NHLE, keys, values, spec = self.before(q_NHLE, keys, values, spec)
        out_NHLE = super().attention(q_NHLE, keys, values, spec)
        return self.after(out_NHLE, q_NHLE, keys, values, spec)

    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, spec

    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out


ACCURATE = "test_attention_is_accurate_and_reads_nothing_past_the_length"


@breaks(ACCURATE, "test_any_attention_is_accurate")
class IgnoresTheWindow(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, window=None)


@breaks(ACCURATE, "test_a_rows_attention_does_not_depend_on_its_neighbours")
class IgnoresTheStarts(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        starts = spec.starts and (min(spec.starts),) * len(spec.starts)
        return q, keys, values, replace(spec, starts=starts)


@breaks(ACCURATE, "test_a_soft_cap_tames_large_scores")
class IgnoresTheSoftCap(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, soft_cap=None)


@breaks(ACCURATE)
class IgnoresTheSlopes(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, slopes=None)


@breaks(ACCURATE)
class IgnoresTheSinks(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, sinks=None)


@breaks(ACCURATE)
class IsAlwaysCausal(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, causal=True)


@breaks("test_attention_takes_any_scale", "test_large_scores_of_both_signs_are_accurate")
class RoundsTheScale(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, scale=2.0 ** round(math.log2(spec.scale)))


@breaks(ACCURATE)
class SharesKeysInTurns(Attends):
    """Query head h uses key/value head h % K."""

    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        num_heads, num_kv_heads = q.shape[1], keys[0].shape[1]
        order = torch.arange(num_heads).view(-1, num_kv_heads).T.flatten()
        return q[:, order], keys, values, spec


@breaks(ACCURATE)
class GivesThePastNoWeight(Attends):
    """Multiplies what lies past the length by zero."""

    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out.add_(0 * sum(page.sum() for page in values))


@breaks(
    "test_attention_takes_keys_in_either_order",
    "test_attention_takes_parts_of_one_projection",
    "test_attention_takes_pages_as_the_cache_lays_them_out",
    "test_attention_takes_a_chunk_behind_parts_of_pages",
)
class IgnoresStridesOfPages(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        keys = [page.as_strided(page.shape, torch.empty(page.shape).stride()) for page in keys]
        return q, keys, values, spec


@breaks("test_attention_takes_pages_that_begin_anywhere")
class AlignsPages(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        values = [
            page.as_strided(page.shape, page.stride(), page.storage_offset() // 4 * 4)
            for page in values
        ]
        return q, keys, values, spec


@breaks("test_attention_takes_queries_head_by_head")
class IgnoresStridesOfQueries(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        _, h, num_queries, e = q.shape
        return q.as_strided(q.shape, (h * num_queries * e, e, h * e, 1)), keys, values, spec


@breaks("test_large_scores_do_not_overflow")
class TakesTheExponentOfTheScore(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        largest = (q @ keys[0].nan_to_num().mT * spec.scale).amax().exp()
        return out.mul_(largest / largest)


@breaks("test_equal_keys_share_the_weight_equally")
class LeavesTheFirstOut(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        return q, keys, values, replace(spec, starts=(1,) * q.shape[0] if q.shape[2] == 1 else None)


@breaks("test_attention_leaves_its_arguments_as_they_were")
class ScalesQueriesInPlace(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        q.mul_(spec.scale)
        return out


@breaks("test_every_attention_has_memory_of_its_own")
class HasOneAttention(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        kept: Tensor = self.__dict__.setdefault("scratch", {}).setdefault(out.shape, out)
        return kept.copy_(out)


@breaks("test_a_row_of_the_cache_that_is_not_finite_spoils_itself_alone")
class ScalesAllQueriesTogether(Attends):
    def after(self, out: Tensor, q: Tensor, keys: Any, values: Any, spec: Any) -> Tensor:
        return out + 0 * q.sum()


@breaks("test_an_attention_takes_the_cache_as_it_is_when_it_is_issued")
class RemembersPagesByAddress(Attends):
    def before(self, q: Tensor, keys: Any, values: Any, spec: Any) -> Any:
        kept = self.__dict__.setdefault("kept", {})
        keys, values = (
            [kept.setdefault(page.data_ptr(), page.clone()) for page in pages]
            for pages in (keys, values)
        )
        return q, keys, values, spec

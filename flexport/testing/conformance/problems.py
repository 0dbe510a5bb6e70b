"""Kernels' arguments with what their results must be, within bounds whose reasons are stated.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, M columns of a cache, E features of a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend
from flexport.testing.conformance.reference import attention_in_float64
from flexport.testing.conformance.tensors import placed, placed_keys, some

__all__ = ["AttentionCase", "AttentionProblem", "Product", "must_be_close"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Sizes and options of one attention test; `heads` are query heads and key/value heads."""

    pages: tuple[int, ...]
    length: int
    queries: int = 1
    rows: int = 2
    heads: tuple[int, int] = (4, 4)
    head_dim: int = 16
    starts: tuple[int, ...] | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    slopes: tuple[float, ...] | None = None
    sinks: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """A matmul and what its result must be."""

    x_TD: Tensor
    weight_FD: Tensor
    bias_F: Tensor | None

    @classmethod
    def draw(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        *,
        with_bias: bool = False,
        seed: int = 0,
    ) -> Product:
        """Random operands of (T, D, F)."""
        num_tokens, num_in, num_out = shape
        return cls(
            x_TD=some((num_tokens, num_in), dtype, seed=seed),
            weight_FD=some((num_out, num_in), dtype, seed=seed + 1),
            bias_F=some((num_out,), dtype, seed=seed + 2) if with_bias else None,
        )

    def on_device(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of `matmul`."""
        bias_F = None if self.bias_F is None else placed(backend, self.bias_F)
        return placed(backend, self.x_TD), placed(backend, self.weight_FD), bias_F

    def run(self, backend: Backend) -> Tensor:
        """The backend's answer."""
        return backend.matmul(*self.on_device(backend))

    def check(self, out_TF: Tensor) -> None:
        """Bound: D + 1 roundings in float32, then two to the dtype (before and after the bias)."""
        product_TF = self.x_TD.double() @ self.weight_FD.double().T
        sizes_TF = self.x_TD.double().abs() @ self.weight_FD.double().abs().T
        exact_TF = product_TF
        if self.bias_F is not None:
            exact_TF = product_TF + self.bias_F.double()
            sizes_TF = sizes_TF + self.bias_F.double().abs()
        unit = torch.finfo(self.x_TD.dtype).eps / 2
        bound_TF = unit * (product_TF.abs() + exact_TF.abs())
        bound_TF = bound_TF * 1.01 + (self.x_TD.shape[1] + 2) * 2**-24 * sizes_TF
        must_be_close(out_TF, exact_TF, bound_TF, self.x_TD.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """An attention and what its result must be."""

    q_NHLE: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    spec: AttentionSpec

    @classmethod
    def draw(
        cls,
        case: AttentionCase,
        dtype: torch.dtype = torch.float32,
        *,
        scale: float | None = None,
        seed: int = 0,
    ) -> AttentionProblem:
        """Random operands: NaN past the length, large numbers where a row has no columns."""
        num_heads, num_kv_heads = case.heads
        shape = (case.rows, num_kv_heads, sum(case.pages), case.head_dim)
        caches = [some(shape, dtype, seed=seed + offset) for offset in (1, 2)]
        for cache_NKME in caches:
            cache_NKME[:, :, case.length :] = math.nan
            for row, start in enumerate(case.starts or ()):
                cache_NKME[row, :, :start] = 1e4
        keys, values = ([p.contiguous() for p in c.split(case.pages, dim=2)] for c in caches)
        spec = AttentionSpec(
            length=case.length,
            scale=case.head_dim**-0.5 if scale is None else scale,
            starts=case.starts,
            causal=case.causal,
            window=case.window,
            soft_cap=case.soft_cap,
            slopes=case.slopes,
            sinks=some((num_heads,), torch.float32, seed=seed + 3) if case.sinks else None,
        )
        q_shape = (case.rows, case.queries, num_heads, case.head_dim)
        # Token by token in memory, as a projection leaves it.
        q_NHLE = some(q_shape, dtype, seed=seed).transpose(1, 2)
        return cls(q_NHLE=q_NHLE, keys=keys, values=values, spec=spec)

    def on_device(
        self, backend: Backend, *, by_feature: bool | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor], AttentionSpec]:
        """The arguments of `attention`; the keys as the backend likes them, or as told."""
        if by_feature is None:
            by_feature = backend.capabilities.keys_by_feature
        sinks = self.spec.sinks
        return (
            placed(backend, self.q_NHLE.transpose(1, 2)).transpose(1, 2),
            [placed_keys(backend, page, by_feature) for page in self.keys],
            [placed(backend, page) for page in self.values],
            replace(self.spec, sinks=None if sinks is None else placed(backend, sinks)),
        )

    def run(self, backend: Backend, *, by_feature: bool | None = None) -> Tensor:
        """The backend's answer."""
        return backend.attention(*self.on_device(backend, by_feature=by_feature))

    def check(self, out_NHLE: Tensor) -> None:
        """Bound: what a kernel loses that rounds scores, weights and partial sums to the dtype.

        A relative error u in scores of size s makes one of about 2 u s in the weights; the
        weights, a few partial sums and the result are rounded once each; float32 sums add 1e-5.
        """
        exact_NHLE, largest_score = attention_in_float64(
            self.q_NHLE, self.keys, self.values, self.spec
        )
        starts = self.spec.starts or (0,) * self.q_NHLE.shape[0]
        values_NKME = torch.cat(self.values, 2)[:, :, : self.spec.length].double()
        largest_value = max(
            float(values_NKME[row, :, start:].abs().max()) for row, start in enumerate(starts)
        )
        unit = torch.finfo(self.q_NHLE.dtype).eps / 2
        bound = (2 * unit * (largest_score + 3) + 1e-5) * largest_value
        must_be_close(out_NHLE, exact_NHLE, torch.full_like(exact_NHLE, bound), self.q_NHLE.dtype)


def must_be_close(found: Tensor, exact: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Assert dtype, shape, and that every error is within its bound."""
    assert found.dtype is dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    # Written so that NaN fails.
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} values are off; the worst by "
        f"{float(error.nan_to_num(math.inf).max())}, allowed about {float(bound.max())} ({dtype})"
    )

"""The meaning of `flexport.backend`: laws that every backend must keep.

Subclass `BackendConformance`, give it a fixture `backend` that opens a fresh backend for each
test, and run pytest. Numbers are compared with float64 references written out plainly below,
within bounds whose reasons stand beside them.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, M columns of a cache, E features of a head.
"""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend, PacksWeights
from flexport.errors import OutOfMemory
from flexport.torch_ops import torch_dtype

__all__ = ["AttentionCase", "BackendConformance", "attention_in_float64"]

COPIED_DTYPES = ("float32", "bfloat16", "float16", "uint8", "int8", "int32", "int64", "bool")

PLACES = ("device", "host")

PATHS = [(src, dst) for src in PLACES for dst in PLACES]

SOME_TEXT = r"\S"
"""Backends choose their own exception types; all the contract asks is that they say something."""

THREADS = 4


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


ATTENTION_CASES = {
    "one column": AttentionCase(pages=(8,), length=1),
    "a full page": AttentionCase(pages=(16,), length=16),
    "a page with room": AttentionCase(pages=(64,), length=9),
    "three pages": AttentionCase(pages=(16, 16, 16), length=37),
    "pages of many sizes": AttentionCase(pages=(3, 40, 7, 64), length=101),
    "a page not reached yet": AttentionCase(pages=(16, 16), length=16),
    "rows that start late": AttentionCase(pages=(16, 16), length=21, rows=3, starts=(0, 20, 17)),
    "one row": AttentionCase(pages=(32,), length=30, rows=1, starts=(5,)),
    "two queries a key": AttentionCase(pages=(16, 16), length=27, heads=(6, 3)),
    "eight queries a key": AttentionCase(pages=(16, 16), length=27, heads=(8, 1), starts=(3, 0)),
    "long": AttentionCase(pages=(64,) * 12, length=721, rows=1, head_dim=64),
    "odd head": AttentionCase(pages=(16,), length=11, head_dim=20),
    "a prompt": AttentionCase(pages=(40,), length=40, queries=40),
    "a prompt over pages": AttentionCase(pages=(16, 16, 16), length=41, queries=41, rows=1),
    "a long prompt": AttentionCase(pages=(300,), length=300, queries=300, rows=1, head_dim=64),
    "a chunk that continues": AttentionCase(pages=(16, 16, 16), length=45, queries=20),
    "a short chunk that continues": AttentionCase(pages=(16, 16, 16), length=45, queries=3),
    "a ragged chunk": AttentionCase(
        pages=(16, 16, 16), length=45, queries=20, rows=3, starts=(0, 25, 7)
    ),
    "a grouped chunk": AttentionCase(
        pages=(16, 32), length=45, queries=17, heads=(8, 2), starts=(4, 0)
    ),
    "a chunk of a row that starts late": AttentionCase(
        pages=(48,), length=45, queries=20, rows=1, starts=(7,)
    ),
    "rows that start late together": AttentionCase(
        pages=(48,), length=45, queries=33, starts=(9, 9), heads=(6, 3)
    ),
    "a prompt with an odd head": AttentionCase(pages=(40,), length=40, queries=40, head_dim=24),
    "not causal": AttentionCase(pages=(16, 16), length=25, queries=25, causal=False),
    "window": AttentionCase(pages=(16, 16, 16), length=41, window=9),
    "window of one": AttentionCase(pages=(16,), length=12, window=1),
    "window wider than the cache": AttentionCase(pages=(16,), length=12, window=50),
    "window over a prompt": AttentionCase(pages=(100,), length=100, queries=100, window=7),
    "window over a chunk": AttentionCase(
        pages=(16, 16, 16), length=45, queries=20, window=11, starts=(2, 20)
    ),
    "window over a long prompt": AttentionCase(
        pages=(300,), length=300, queries=300, rows=1, window=140
    ),
    "soft-cap": AttentionCase(pages=(16, 16), length=20, soft_cap=3.0),
    "soft-cap over a prompt": AttentionCase(pages=(33,), length=33, queries=33, soft_cap=3.0),
    "slopes": AttentionCase(pages=(16, 16), length=20, slopes=(0.5, 0.25, 0.125, 0.0)),
    "slopes over a ragged chunk": AttentionCase(
        pages=(16, 16), length=20, queries=6, slopes=(0.5, 0.25, 0.125, 1.0), starts=(14, 2)
    ),
    "sinks": AttentionCase(pages=(16, 16), length=20, sinks=True, heads=(4, 2)),
    "sinks over a prompt": AttentionCase(pages=(32,), length=32, queries=32, sinks=True),
    "everything": AttentionCase(
        pages=(16, 16, 16),
        length=45,
        queries=20,
        heads=(4, 2),
        starts=(5, 25),
        window=13,
        soft_cap=4.0,
        slopes=(0.5, 0.25, 0.125, 0.0),
        sinks=True,
    ),
}

# Some kernels have a path of their own for few rows, for widths that fill no register, ...
MATMUL_SHAPES = [
    (1, 8, 8),
    (1, 64, 37),
    (1, 256, 512),
    (3, 5, 7),
    (16, 128, 33),
    (65, 96, 130),
    (300, 64, 48),
    (0, 16, 8),
]


class BackendConformance:
    """Subclass this and give it a `backend` fixture with a fresh backend for each test."""

    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        """Open the backend under test, yield it, close it."""
        raise NotImplementedError("a conformance test class needs a `backend` fixture")

    # capabilities

    def test_capabilities_are_plain_facts_that_do_not_change(self, backend: Backend) -> None:
        facts = backend.capabilities

        assert facts == backend.capabilities
        assert facts.name
        assert facts.memory_bytes > 0
        assert facts.page_tokens > 0
        assert facts.dtype_reason
        assert facts.dtypes
        assert set(facts.dtypes) <= {"float32", "bfloat16", "float16"}

    def test_only_a_device_that_shares_the_hosts_tensors_is_addressable(
        self, backend: Backend
    ) -> None:
        device = backend.allocate((4,), torch.float32)

        assert not backend.capabilities.addressable or device.device.type == "cpu"

    # allocate

    @pytest.mark.parametrize("where", PLACES)
    @pytest.mark.parametrize("dtype", COPIED_DTYPES)
    def test_allocate_gives_the_shape_and_dtype_asked_for_contiguous(
        self, backend: Backend, dtype: str, where: Literal["device", "host"]
    ) -> None:
        for shape in ((), (7,), (3, 5, 2), (0, 4), (1025, 1024)):
            tensor = backend.allocate(shape, getattr(torch, dtype), where)

            assert tuple(tensor.shape) == shape
            assert tensor.dtype is getattr(torch, dtype)
            assert tensor.is_contiguous()

    def test_host_memory_is_the_cpus(self, backend: Backend) -> None:
        # On some devices a "pinned" tensor is in truth a device tensor.
        assert backend.allocate((4,), torch.float32, "host").device.type == "cpu"

    def test_device_memory_is_all_on_one_device(self, backend: Backend) -> None:
        first = backend.allocate((4,), torch.float32)
        second = backend.allocate((4,), torch.uint8)

        assert first.device == second.device

    @pytest.mark.parametrize("where", PLACES)
    def test_allocations_do_not_overlap(
        self, backend: Backend, where: Literal["device", "host"]
    ) -> None:
        tensors = [backend.allocate((17,), torch.int32, where) for _ in range(9)]

        for number, tensor in enumerate(tensors):
            tensor.fill_(number)

        backend.sync()
        assert [set(tensor.tolist()) for tensor in tensors] == [{n} for n in range(9)]

    @pytest.mark.parametrize("where", PLACES)
    def test_memory_allocated_in_inference_mode_can_be_written_outside_it(
        self, backend: Backend, where: Literal["device", "host"]
    ) -> None:
        with torch.inference_mode():
            tensors = [backend.allocate((n,), torch.float32, where) for n in (4, 2 << 20)]

        for tensor in tensors:
            tensor.zero_()

        assert all(float(tensor.sum()) == 0 for tensor in tensors)

    def test_an_allocation_without_room_raises_out_of_memory(self, backend: Backend) -> None:
        with pytest.raises(OutOfMemory):
            backend.allocate((1 << 50,), torch.uint8)

    # copy_async

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    @pytest.mark.parametrize("dtype", COPIED_DTYPES)
    def test_a_copy_is_exact(
        self,
        backend: Backend,
        dtype: str,
        src: Literal["device", "host"],
        dst: Literal["device", "host"],
    ) -> None:
        data = _some((33, 7), getattr(torch, dtype))
        source = _placed(backend, data, src)
        target = backend.allocate(data.shape, data.dtype, dst)

        backend.copy_async(source, target).join()

        assert torch.equal(_on_host(backend, target), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_of_nothing_and_of_one_number_work(
        self, backend: Backend, src: Literal["device", "host"], dst: Literal["device", "host"]
    ) -> None:
        for data in (torch.zeros(0, 3), torch.tensor(2.5)):
            target = backend.allocate(data.shape, data.dtype, dst)

            backend.copy_async(_placed(backend, data, src), target).join()

            assert torch.equal(_on_host(backend, target), data)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_between_slices_leaves_the_rest_alone(
        self, backend: Backend, src: Literal["device", "host"], dst: Literal["device", "host"]
    ) -> None:
        # Columns of a page: what a cache writes. They are strided on both sides.
        data = _some((2, 3, 8, 4), torch.float32)
        before = _some((2, 3, 16, 4), torch.float32)
        source, target = _placed(backend, data, src), _placed(backend, before, dst)

        backend.copy_async(source[:, :, 1:6], target[:, :, 9:14]).join()

        expected = before.clone()
        expected[:, :, 9:14] = data[:, :, 1:6]
        assert torch.equal(_on_host(backend, target), expected)

    @pytest.mark.parametrize(("src", "dst"), PATHS)
    def test_a_copy_of_rows_leaves_the_rest_alone(
        self, backend: Backend, src: Literal["device", "host"], dst: Literal["device", "host"]
    ) -> None:
        data, before = _some((8, 5), torch.bfloat16), _some((16, 5), torch.bfloat16)
        source, target = _placed(backend, data, src), _placed(backend, before, dst)

        backend.copy_async(source[2:7], target[11:16]).join()

        expected = before.clone()
        expected[11:16] = data[2:7]
        assert torch.equal(_on_host(backend, target), expected)

    def test_a_copy_sees_the_device_work_issued_before_it(self, backend: Backend) -> None:
        values = _placed(backend, torch.ones(512, 512), "device")
        target = backend.allocate(values.shape, values.dtype, "host")

        for _ in range(50):
            values = values * 1.0 + 1.0
        backend.copy_async(values, target).join()

        assert set(target.flatten().tolist()) == {51.0}

    def test_device_work_after_wait_sees_the_copy(self, backend: Backend) -> None:
        data = _some((512, 512), torch.float32)
        source = _placed(backend, data, "host")
        target = _placed(backend, torch.zeros(512, 512), "device")

        backend.copy_async(source, target).wait()
        doubled = target * 2

        assert torch.equal(_on_host(backend, doubled), data * 2)

    def test_a_copy_after_wait_sees_the_copy_waited_for(self, backend: Backend) -> None:
        data = _some((256, 256), torch.float32)
        source = _placed(backend, data, "host")
        middle = backend.allocate(data.shape, data.dtype)
        target = backend.allocate(data.shape, data.dtype, "host")

        backend.copy_async(source, middle).wait()
        backend.copy_async(middle, target).join()

        assert torch.equal(target, data)

    def test_a_copy_holds_its_tensors_until_it_is_done(self, backend: Backend) -> None:
        data = _some((1 << 18,), torch.float32)
        target = backend.allocate(data.shape, data.dtype)
        source = _placed(backend, data, "host")

        ticket = backend.copy_async(source, target)
        del source
        gc.collect()
        # Memory that was given up too early would be handed out again, and overwritten, here.
        others = [backend.allocate(data.shape, data.dtype, "host").zero_() for _ in range(4)]
        ticket.join()

        assert torch.equal(_on_host(backend, target), data)
        assert len(others) == 4

    def test_many_copies_at_once_all_arrive(self, backend: Backend) -> None:
        data = [_some((97,), torch.float32, seed=number) for number in range(64)]
        sources = [_placed(backend, values, "host") for values in data]
        targets = [backend.allocate((97,), torch.float32) for _ in data]

        tickets = [
            backend.copy_async(source, target)
            for source, target in zip(sources, targets, strict=True)
        ]
        for ticket in reversed(tickets):
            ticket.join()

        for values, target in zip(data, targets, strict=True):
            assert torch.equal(_on_host(backend, target), values)

    def test_a_ticket_can_be_waited_for_and_joined_again(self, backend: Backend) -> None:
        source = _placed(backend, torch.ones(3), "host")
        ticket = backend.copy_async(source, backend.allocate((3,), torch.float32))

        ticket.join()
        ticket.wait()
        ticket.join()

    def test_sync_waits_for_copies(self, backend: Backend) -> None:
        data = _some((512, 512), torch.float32)
        target = backend.allocate(data.shape, data.dtype, "host")

        backend.copy_async(_placed(backend, data, "device"), target)
        backend.sync()

        assert torch.equal(target, data)

    def test_a_copy_may_fill_a_tensor_made_in_inference_mode(self, backend: Backend) -> None:
        data = _some((9,), torch.float32)
        source = _placed(backend, data, "device")
        with torch.inference_mode():
            target = source * 0

        backend.copy_async(source, target).join()

        assert torch.equal(_on_host(backend, target), data)

    def test_the_error_of_a_copy_reaches_its_ticket_and_sync(self, backend: Backend) -> None:
        source = _placed(backend, torch.ones(3), "host")
        target = backend.allocate((4,), torch.float32)

        try:
            ticket = backend.copy_async(source, target)
        except Exception:  # noqa: BLE001
            return  # refused at once, which is better still

        with pytest.raises(Exception, match=SOME_TEXT):
            ticket.wait()
        with pytest.raises(Exception, match=SOME_TEXT):
            ticket.join()
        with pytest.raises(Exception, match=SOME_TEXT):
            backend.sync()
        backend.sync()  # an error is told once

    # matmul

    @pytest.mark.parametrize("shape", MATMUL_SHAPES, ids=str)
    @pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
    def test_matmul_is_accurate(
        self, backend: Backend, shape: tuple[int, int, int], with_bias: bool
    ) -> None:
        for dtype in _dtypes(backend):
            problem = _Product.draw(shape, dtype, with_bias=with_bias)

            out_TF = backend.matmul(*problem.on_device(backend))

            problem.check(_on_host(backend, out_TF))

    @pytest.mark.parametrize("shape", MATMUL_SHAPES, ids=str)
    @pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
    def test_matmul_on_a_packed_weight_is_accurate(
        self, backend: Backend, shape: tuple[int, int, int], with_bias: bool
    ) -> None:
        if not isinstance(backend, PacksWeights):
            pytest.skip("this backend does not pack weights")
        for dtype in _dtypes(backend):
            problem = _Product.draw(shape, dtype, with_bias=with_bias)
            x_TD, weight_FD, bias_F = problem.on_device(backend)

            out_TF = backend.matmul(x_TD, backend.pack(weight_FD), bias_F)

            problem.check(_on_host(backend, out_TF))

    def test_matmul_takes_views_of_larger_tensors(self, backend: Backend) -> None:
        for dtype in _dtypes(backend):
            problem = _Product.draw((5, 24, 10), dtype, with_bias=True)
            x_TD, weight_FD, bias_F = problem.on_device(backend)
            flat = backend.allocate((weight_FD.numel() + 3,), dtype)
            shifted_FD = flat[3:].view(weight_FD.shape)
            backend.copy_async(weight_FD, shifted_FD).wait()
            wide = backend.allocate((5, 48), dtype)
            backend.copy_async(x_TD, wide[:, 7:31]).wait()

            out_TF = backend.matmul(wide[:, 7:31], shifted_FD, bias_F)

            problem.check(_on_host(backend, out_TF))

    # attention

    @pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())
    def test_attention_is_accurate_and_reads_nothing_past_the_length(
        self, backend: Backend, case: AttentionCase
    ) -> None:
        for dtype in _dtypes(backend):
            problem = _Attention.draw(case, dtype)

            out_NHLE = problem.run(backend)

            problem.check(_on_host(backend, out_NHLE))

    def test_attention_takes_keys_in_either_order(self, backend: Backend) -> None:
        """A prompt that is all new comes as the projection left it, whatever pages look like."""
        for name in ("three pages", "a ragged chunk", "eight queries a key"):
            problem = _Attention.draw(ATTENTION_CASES[name], torch.float32)
            for by_feature in (False, True):
                q_NHLE, _, values, spec = problem.on_device(backend)
                keys = [_placed_keys(backend, page, by_feature) for page in problem.keys]

                out_NHLE = backend.attention(q_NHLE, keys, values, spec)

                problem.check(_on_host(backend, out_NHLE))

    def test_attention_takes_a_scale_that_is_no_power_of_two(self, backend: Backend) -> None:
        case = AttentionCase(pages=(16, 16), length=20, head_dim=24)
        problem = _Attention.draw(case, torch.float32, scale=0.3)

        out_NHLE = problem.run(backend)

        problem.check(_on_host(backend, out_NHLE))

    def test_attention_leaves_the_cache_as_it_was(self, backend: Backend) -> None:
        problem = _Attention.draw(ATTENTION_CASES["a ragged chunk"], torch.float32)
        q_NHLE, keys, values, spec = problem.on_device(backend)

        backend.attention(q_NHLE, keys, values, spec)

        for page, before in zip([*keys, *values], [*problem.keys, *problem.values], strict=True):
            after = _on_host(backend, page)
            assert torch.equal(after.nan_to_num(7.0), before.nan_to_num(7.0))

    def test_a_rows_attention_does_not_depend_on_its_neighbours(self, backend: Backend) -> None:
        case = AttentionCase(pages=(16, 16), length=21, rows=3, starts=(0, 20, 9))
        problem = _Attention.draw(case, torch.float32)
        q_NHLE, keys, values, spec = problem.on_device(backend)

        together = _on_host(backend, backend.attention(q_NHLE, keys, values, spec))

        assert spec.starts is not None
        for row, start in enumerate(spec.starts):
            only = slice(row, row + 1)
            alone_spec = AttentionSpec(length=spec.length, scale=spec.scale, starts=(start,))
            alone = backend.attention(
                q_NHLE[only], [p[only] for p in keys], [p[only] for p in values], alone_spec
            )
            difference = (together[only] - _on_host(backend, alone)).abs().max()
            assert float(difference) <= 1e-5

    # all together

    def test_verbs_may_be_called_from_many_threads(self, backend: Backend) -> None:
        def work(seed: int) -> None:
            for round_number in range(5):
                product = _Product.draw((9, 32, 17), torch.float32, with_bias=True, seed=seed)
                product.check(_on_host(backend, backend.matmul(*product.on_device(backend))))
                attention = _Attention.draw(
                    ATTENTION_CASES["two queries a key"], torch.float32, seed=seed + round_number
                )
                attention.check(_on_host(backend, attention.run(backend)))

        _in_threads(work)

    def test_kernels_work_in_inference_mode_and_then_outside_it(self, backend: Backend) -> None:
        product = _Product.draw((9, 32, 17), torch.float32, with_bias=True)
        attention = _Attention.draw(ATTENTION_CASES["a ragged chunk"], torch.float32)

        def work(_: int) -> None:
            # In a thread of its own, which has met no kernel before.
            for inference in (True, False):
                with torch.inference_mode(inference):
                    out_TF = backend.matmul(*product.on_device(backend))
                    out_NHLE = attention.run(backend)
                product.check(_on_host(backend, out_TF))
                attention.check(_on_host(backend, out_NHLE))

        _in_threads(work)

    def test_close_may_be_called_twice_and_ends_the_other_verbs(self, backend: Backend) -> None:
        tensor = _placed(backend, torch.ones(2, 2), "device")

        backend.close()
        backend.close()

        with pytest.raises(Exception, match=SOME_TEXT):
            backend.allocate((1,), torch.float32)
        with pytest.raises(Exception, match=SOME_TEXT):
            backend.matmul(tensor, tensor)


def attention_in_float64(
    q_NHLE: Tensor, keys_NKGE: Sequence[Tensor], values_NKGE: Sequence[Tensor], spec: AttentionSpec
) -> tuple[Tensor, float]:
    """The contract's attention, query by query on the CPU; and the largest |score|."""
    keys_NKME = torch.cat(list(keys_NKGE), 2)[:, :, : spec.length].double()
    values_NKME = torch.cat(list(values_NKGE), 2)[:, :, : spec.length].double()
    num_rows, num_heads, num_queries, _ = q_NHLE.shape
    group = num_heads // keys_NKME.shape[1]
    columns_M = torch.arange(spec.length, dtype=torch.float64)
    out_NHLE = torch.empty_like(q_NHLE, dtype=torch.float64)
    largest = 0.0
    for n in range(num_rows):
        start = spec.starts[n] if spec.starts is not None else 0
        for h in range(num_heads):
            scores_LM = q_NHLE[n, h].double() @ keys_NKME[n, h // group].T * spec.scale
            largest = max(largest, float(scores_LM[:, start:].abs().max()))
            for i in range(num_queries):
                column = spec.length - num_queries + i
                scores_M = scores_LM[i]
                if spec.soft_cap is not None:
                    scores_M = spec.soft_cap * torch.tanh(scores_M / spec.soft_cap)
                if spec.slopes is not None:
                    scores_M = scores_M + spec.slopes[h] * (columns_M - column)
                first = start if spec.window is None else max(start, column + 1 - spec.window)
                end = column + 1 if spec.causal else spec.length
                weights = (scores_M[first:end] - scores_M[first:end].max()).exp()
                total = weights.sum()
                if spec.sinks is not None:
                    total = total + (spec.sinks[h].double() - scores_M[first:end].max()).exp()
                out_NHLE[n, h, i] = (weights / total) @ values_NKME[n, h // group, first:end]
    return out_NHLE, largest


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A matmul and what its result must be."""

    x_TD: Tensor
    weight_FD: Tensor
    bias_F: Tensor | None

    @classmethod
    def draw(
        cls, shape: tuple[int, int, int], dtype: torch.dtype, *, with_bias: bool, seed: int = 0
    ) -> _Product:
        """Random operands of (T, D, F)."""
        num_tokens, num_in, num_out = shape
        return cls(
            x_TD=_some((num_tokens, num_in), dtype, seed=seed),
            weight_FD=_some((num_out, num_in), dtype, seed=seed + 1),
            bias_F=_some((num_out,), dtype, seed=seed + 2) if with_bias else None,
        )

    def on_device(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor | None]:
        """The arguments of `matmul`."""
        bias_F = None if self.bias_F is None else _placed(backend, self.bias_F, "device")
        return (
            _placed(backend, self.x_TD, "device"),
            _placed(backend, self.weight_FD, "device"),
            bias_F,
        )

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
        _must_be_close(out_TF, exact_TF, bound_TF, self.x_TD.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Attention:
    """An attention and what its result must be."""

    q_NHLE: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    spec: AttentionSpec

    @classmethod
    def draw(
        cls, case: AttentionCase, dtype: torch.dtype, *, scale: float | None = None, seed: int = 0
    ) -> _Attention:
        """Random operands: NaN past the length, large numbers where a row has no columns."""
        num_heads, num_kv_heads = case.heads
        shape = (case.rows, num_kv_heads, sum(case.pages), case.head_dim)
        caches = [_some(shape, dtype, seed=seed + offset) for offset in (1, 2)]
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
            sinks=_some((num_heads,), torch.float32, seed=seed + 3) if case.sinks else None,
        )
        q_shape = (case.rows, case.queries, num_heads, case.head_dim)
        # Token by token in memory, as a projection leaves it.
        q_NHLE = _some(q_shape, dtype, seed=seed).transpose(1, 2)
        return cls(q_NHLE=q_NHLE, keys=keys, values=values, spec=spec)

    def on_device(
        self, backend: Backend
    ) -> tuple[Tensor, list[Tensor], list[Tensor], AttentionSpec]:
        """The arguments of `attention`."""
        sinks = self.spec.sinks
        fields = {name: getattr(self.spec, name) for name in AttentionSpec.__dataclass_fields__}
        fields["sinks"] = None if sinks is None else _placed(backend, sinks, "device")
        return (
            _placed(backend, self.q_NHLE.transpose(1, 2), "device").transpose(1, 2),
            [
                _placed_keys(backend, page, backend.capabilities.keys_by_feature)
                for page in self.keys
            ],
            [_placed(backend, page, "device") for page in self.values],
            AttentionSpec(**fields),
        )

    def run(self, backend: Backend) -> Tensor:
        """The backend's answer."""
        return backend.attention(*self.on_device(backend))

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
        _must_be_close(out_NHLE, exact_NHLE, torch.full_like(exact_NHLE, bound), self.q_NHLE.dtype)


def _must_be_close(found: Tensor, exact: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype is dtype
    assert found.shape == exact.shape
    error = (found.double() - exact).abs()
    # Written so that NaN fails.
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} values are off; the worst by "
        f"{float(error.nan_to_num(math.inf).max())}, allowed about {float(bound.max())} ({dtype})"
    )


def _dtypes(backend: Backend) -> list[torch.dtype]:
    """What the backend says it computes in, and float32, which all do."""
    names = dict.fromkeys([*backend.capabilities.dtypes, "float32"])
    return [torch_dtype(name) for name in names]


def _some(shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Seeded values in host memory; floats are normal, integers use their bits."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(tuple(shape), generator=generator).to(dtype)
    return torch.randint(0, 127, tuple(shape), generator=generator).to(dtype)


def _placed(backend: Backend, data: Tensor, where: Literal["device", "host"]) -> Tensor:
    """A copy of a plain CPU tensor in the backend's memory."""
    host = backend.allocate(data.shape, data.dtype, "host")
    host.copy_(data)
    if where == "host":
        return host
    device = backend.allocate(data.shape, data.dtype)
    backend.copy_async(host, device).join()
    return device


def _placed_keys(backend: Backend, keys_NKGE: Tensor, by_feature: bool) -> Tensor:
    """The same in device memory, feature by feature or column by column."""
    if by_feature:
        return _placed(backend, keys_NKGE.mT, "device").mT
    return _placed(backend, keys_NKGE, "device")


def _on_host(backend: Backend, tensor: Tensor) -> Tensor:
    """A tensor's values where this process can look at them."""
    host = backend.allocate(tensor.shape, tensor.dtype, "host")
    backend.copy_async(tensor, host).join()
    return host


def _in_threads(work: Callable[[int], None]) -> None:
    """Run `work(0)`, `work(1)`, ... at the same time; raise the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]

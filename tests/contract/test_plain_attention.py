"""The attention that plug-ins share keeps the contract, in plain torch on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from flexport_emulated.backend import EmulatedBackend
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexport.backend import AttentionSpec, Backend, Capabilities, Ticket
from flexport.errors import OutOfMemory
from flexport.testing import BackendConformance, attention_in_float64
from flexport.testing.conformance.attention import ATTENTION_CASES
from flexport.testing.conformance.problems import AttentionProblem
from flexport.testing.conformance.tensors import on_host
from flexport.torch_ops import attention as plain


class PlainBackend:
    """As little as makes a backend: host memory, copies at once, and the shared attention."""

    def __init__(self) -> None:
        self.capabilities = Capabilities(
            name="plain torch",
            memory_bytes=1 << 30,
            unified=True,
            dtypes=("float32", "bfloat16", "float16"),
            dtype_reason="it is a test",
            page_tokens=16,
        )
        self._closed = threading.Event()

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        self._check()
        try:
            with torch.inference_mode(False):
                return torch.empty(tuple(shape), dtype=dtype)
        except RuntimeError as error:
            raise OutOfMemory(str(error)) from error

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        self._check()
        if src.shape != dst.shape or src.dtype != dst.dtype:
            raise ValueError("a copy needs one shape and dtype")
        with torch.inference_mode():
            dst.copy_(src)
        return Done()

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        self._check()
        return torch.nn.functional.linear(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        self._check()
        return plain.attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def sync(self) -> None:
        self._check()

    def close(self) -> None:
        self._closed.set()

    def _check(self) -> None:
        if self._closed.is_set():
            raise RuntimeError("closed")


class Done:
    def wait(self) -> None:
        pass

    join = wait


class TestPlain(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PlainBackend()
        yield backend
        backend.close()


class TestPlainInSmallTiles(BackendConformance):
    """So small that rows, heads and queries are divided, and every tile meets page borders."""

    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
        monkeypatch.setattr(plain, "TILE_BYTES", 1500)
        monkeypatch.setattr(plain, "TILE_QUERIES", 7)
        monkeypatch.setattr(plain, "KEPT_MASK_BYTES", 64)
        backend = PlainBackend()
        yield backend
        backend.close()


class TestPlainWithKeysByFeature(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PlainBackend()
        backend.capabilities = replace(backend.capabilities, keys_by_feature=True)
        yield backend
        backend.close()


class Diary(TorchDispatchMode):
    """Writes down the operations, and the largest tensor that one made."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.largest_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if isinstance(out, Tensor):
            self.largest_bytes = max(self.largest_bytes, out.untyped_storage().nbytes())
        return out


def draw(
    num_rows: int, heads: tuple[int, int], pages: Sequence[int], num_queries: int, head_dim: int = 8
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    q_NHLE = torch.randn(num_rows, heads[0], num_queries, head_dim, generator=generator)
    keys, values = (
        [torch.randn(num_rows, heads[1], g, head_dim, generator=generator) for g in pages]
        for _ in range(2)
    )
    return q_NHLE, keys, values


def test_pages_that_no_query_sees_are_not_multiplied() -> None:
    q_NHLE, keys, values = draw(2, (4, 4), (16,) * 6, 1)
    spec = AttentionSpec(length=70, scale=0.5, window=20)

    with Diary() as diary:
        plain.attention(q_NHLE, keys, values, spec)

    assert diary.names.count("bmm") == 2 * 2  # columns 50 to 69 lie in two pages


def test_grouped_heads_share_one_product_a_page() -> None:
    q_NHLE, keys, values = draw(2, (8, 2), (16,), 1)

    with Diary() as diary:
        plain.attention(q_NHLE, keys, values, AttentionSpec(length=16, scale=0.5))

    assert diary.names.count("bmm") == 2
    assert not {"repeat", "repeat_interleave", "cat", "_to_copy"} & set(diary.names)


def test_work_memory_is_bounded_by_the_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "TILE_BYTES", 1 << 16)
    q_NHLE, keys, values = draw(4, (8, 4), (256, 256), 100, head_dim=4)

    with Diary() as diary:
        plain.attention(q_NHLE, keys, values, AttentionSpec(length=512, scale=0.5))

    assert diary.largest_bytes <= max(1 << 16, q_NHLE.numel() * 4)


def test_a_second_layer_makes_no_mask_and_uploads_nothing() -> None:
    q_NHLE, keys, values = draw(3, (4, 4), (16, 16), 1)
    spec = AttentionSpec(length=29, scale=0.5, starts=(0, 11, 28), slopes=(0.5, 0.25, 0.2, 0.1))
    plain.attention(q_NHLE, keys, values, spec)

    with Diary() as diary:
        plain.attention(q_NHLE, keys, values, spec)

    assert not {"lt", "le", "gt", "_to_copy_", "lift_fresh", "_tensor"} & set(diary.names)


def test_starts_and_slopes_of_equal_numbers_are_kept_apart() -> None:
    q_NHLE, keys, values = draw(2, (2, 2), (16,), 1)
    starts_spec = AttentionSpec(length=9, scale=0.5, starts=(0, 1))
    slopes_spec = AttentionSpec(length=9, scale=0.5, slopes=(0.0, 1.0))

    for spec in (starts_spec, slopes_spec):
        out_NHLE = plain.attention(q_NHLE, keys, values, spec)

        exact_NHLE, _ = attention_in_float64(q_NHLE, keys, values, spec)
        assert float((out_NHLE - exact_NHLE).abs().max()) < 1e-5


@pytest.mark.parametrize("num_queries", [1, 2, 3])
@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("starts", [(0, 0), (0, 1), (6, 2)])
def test_masks_are_right_at_their_borders(
    num_queries: int, window: int | None, starts: tuple[int, ...]
) -> None:
    q_NHLE, keys, values = draw(2, (2, 2), (4, 8), num_queries)
    spec = AttentionSpec(length=9, scale=0.5, starts=starts, window=window)

    out_NHLE = plain.attention(q_NHLE, keys, values, spec)

    exact_NHLE, _ = attention_in_float64(q_NHLE, keys, values, spec)
    assert float((out_NHLE - exact_NHLE).abs().max()) < 1e-5


def test_float16_scores_that_overflow_unscaled_come_out_right() -> None:
    q_NHLE, keys, values = draw(1, (1, 1), (4,), 1, head_dim=64)
    q_NHLE, keys = (q_NHLE.sign() * 40).half(), [(keys[0].sign() * 60).half()]
    keys[0][0, 0, 2] = q_NHLE[0, 0, 0].sign() * 60  # its score is 64 * 2400, scaled 4800
    spec = AttentionSpec(length=4, scale=1 / 32)

    out_NHLE = plain.attention(q_NHLE, keys, [values[0].half()], spec)

    assert torch.equal(out_NHLE[0, 0, 0], values[0][0, 0, 2].half())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"length": 17}, "pages of 16 columns"),
        ({"length": 2}, "3 queries"),
        ({"starts": (0,)}, "1 starts"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    change: dict[str, Any], complaint: str
) -> None:
    q_NHLE, keys, values = draw(2, (4, 2), (16,), 3)

    with pytest.raises(ValueError, match=complaint):
        plain.attention(q_NHLE, keys, values, replace(AttentionSpec(length=9, scale=1.0), **change))


def test_on_a_device_of_its_own_only_starts_and_slopes_go_up_and_nothing_comes_back() -> None:
    """The emulated accelerator mixes its tensors with the host's in no operation."""
    backend = EmulatedBackend()
    uploads = []
    try:
        for name in ("everything", "a ragged chunk", "three pages", "eight queries a key"):
            problem = AttentionProblem.draw(ATTENTION_CASES[name], torch.float32)
            arguments = problem.on_device(backend)
            for _ in range(2):
                before = backend.num_uploads
                out_NHLE = plain.attention(*arguments)
                uploads.append(backend.num_uploads - before)
                problem.check(on_host(backend, out_NHLE))
            assert backend.num_reads == 0
        assert uploads == [2, 0, 1, 0, 0, 0, 1, 0]
    finally:
        plain.forget()
        backend.close()

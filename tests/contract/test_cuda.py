"""The CUDA plug-in keeps the contract, on a card of threads everywhere and on a real one if any."""

from __future__ import annotations

import contextlib
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any, Literal, cast

import pytest
import torch
from fake_card import FakeCard, FakeStream
from flexport_cuda import PLUGIN, kernels, pinned, streams
from flexport_cuda.backend import CudaBackend
from flexport_cuda.kernels import choose
from flexport_cuda.runtime import _TorchStream
from flexport_emulated.device_tensor import DeviceTensor
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flexport.backend import AttentionSpec, Backend
from flexport.errors import OutOfMemory
from flexport.testing import AttentionCase, BackendConformance
from flexport.testing.conformance.attention import ATTENTION_CASES
from flexport.testing.conformance.problems import AttentionProblem
from flexport.testing.conformance.tensors import on_host, placed

UP, UP_SMALL, DOWN, DOWN_SMALL = range(4)
"""The card's streams beside the default one, in the order in which they are made."""

SOON_S = 0.05
"""Long enough for what must not happen to happen, if nothing keeps it."""


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FLEXPORT_CUDA_MEMORY", "FLEXPORT_CUDA_PINNED"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def card() -> Iterator[FakeCard]:
    card = FakeCard()
    yield card
    card.close()


@pytest.fixture
def backend(card: FakeCard) -> Iterator[CudaBackend]:
    backend = CudaBackend(card)
    yield backend
    backend.close()


class TestCudaOnACardOfThreads(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = CudaBackend(FakeCard())
        yield backend
        backend.close()


class TestCudaOnAnOldCardAFewRowsAtATime(BackendConformance):
    """Such a card has no bfloat16, and no fused kernel for grouped heads."""

    @pytest.fixture
    def backend(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
        monkeypatch.setattr(kernels, "MASKED_BYTES", 1)
        monkeypatch.setattr(kernels, "MASKED_QUERIES", 2)
        backend = CudaBackend(FakeCard(dtypes=("float16", "float32")))
        yield backend
        backend.close()


@pytest.mark.cuda
class TestCudaOnARealCard(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PLUGIN.open()
        yield backend
        backend.close()


# order


def test_a_copy_waits_for_the_kernels_before_it_and_the_next_kernels_for_its_ticket(
    backend: CudaBackend, card: FakeCard
) -> None:
    source = placed(backend, torch.full((64,), 2.0), "host")
    target = placed(backend, torch.ones(64), "device")
    up = card.streams[UP_SMALL]

    with card.compute.held():
        before = target * 10
        ticket = backend.copy_async(source, target)
        ticket.wait()
        after = target * 10
        time.sleep(SOON_S)
        assert not up.lane.idle

    assert set(on_host(backend, before).tolist()) == {10.0}
    assert set(on_host(backend, after).tolist()) == {20.0}


def test_kernels_wait_for_no_copy_but_those_waited_for(
    backend: CudaBackend, card: FakeCard
) -> None:
    first, second = (placed(backend, torch.ones(8), "device") for _ in range(2))
    source = placed(backend, torch.ones(8), "host")
    up, down = card.streams[UP_SMALL], card.streams[DOWN_SMALL]

    with up.held():
        backend.copy_async(source, first)
        doubled = second * 2
        card.compute.record().synchronize()
        assert set(on_host(backend, doubled).tolist()) == {2.0}
        assert not up.lane.idle
    with down.held():
        host = backend.allocate((8,), torch.float32, "host")
        backend.copy_async(first, host)
        backend.copy_async(source, second).join()
        assert not down.lane.idle


def test_wait_returns_while_the_copy_is_under_way(backend: CudaBackend, card: FakeCard) -> None:
    source = placed(backend, torch.ones(8), "host")
    target = backend.allocate((8,), torch.float32)

    with card.streams[UP_SMALL].held():
        ticket = backend.copy_async(source, target)
        ticket.wait()
        assert not card.streams[UP_SMALL].lane.idle
    ticket.join()


@pytest.mark.parametrize(("up", "stream"), [(True, UP), (False, DOWN)], ids=["up", "down"])
def test_a_small_copy_does_not_queue_behind_a_large_one(
    up: bool, stream: int, backend: CudaBackend, card: FakeCard
) -> None:
    here: Literal["device", "host"] = "host" if up else "device"
    there: Literal["device", "host"] = "device" if up else "host"
    large, small = (
        placed(backend, torch.arange(num_values, dtype=torch.float32), here)
        for num_values in (streams.SMALL_BYTES // 4, 7)
    )
    targets = [backend.allocate(source.shape, source.dtype, there) for source in (large, small)]

    with card.streams[stream].held():
        behind = backend.copy_async(large, targets[0])
        backend.copy_async(small, targets[1]).join()
        assert not card.streams[stream].lane.idle
    behind.join()

    for source, target in zip((large, small), targets, strict=True):
        assert torch.equal(on_host(backend, source), on_host(backend, target))


@pytest.mark.parametrize("num_values", [64, 65, 129])
def test_a_large_copy_is_cut_so_that_small_ones_come_between(
    num_values: int, backend: CudaBackend, card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "CUT_BYTES", 64 * 4)
    data = torch.arange(2.0 * num_values).view(2, num_values)
    source = placed(backend, data, "host")
    target = backend.allocate(data.shape, data.dtype)
    copies: list[int] = []
    copy = FakeStream.copy

    def count(self: FakeStream, src: Tensor, dst: Tensor) -> None:
        copies.append(src.numel())
        copy(self, src, dst)

    monkeypatch.setattr(FakeStream, "copy", count)
    backend.copy_async(source, target).join()
    in_parts = list(copies)

    assert sum(in_parts) == 2 * num_values
    assert max(in_parts) == 64
    assert torch.equal(on_host(backend, target), data)


def test_a_copy_within_the_host_is_behind_the_copies_waited_for(
    backend: CudaBackend, card: FakeCard
) -> None:
    source = placed(backend, torch.full((8,), 3.0), "device")
    middle, target = (backend.allocate((8,), torch.float32, "host").zero_() for _ in range(2))
    down = card.streams[DOWN_SMALL]

    def go_on() -> None:
        backend.copy_async(middle, target).join()

    with down.held():
        backend.copy_async(source, middle).wait()
        thread = threading.Thread(target=go_on)
        thread.start()
        thread.join(SOON_S)
        assert thread.is_alive()
    thread.join()

    assert set(target.tolist()) == {3.0}


def test_a_verb_beside_the_default_stream_is_refused(backend: CudaBackend, card: FakeCard) -> None:
    x = backend.allocate((2, 2), torch.float32)

    card.computes_in_order = False

    with pytest.raises(RuntimeError, match="another stream than the default one"):
        backend.matmul(x, x)
    with pytest.raises(RuntimeError, match="another stream than the default one"):
        backend.copy_async(x, x.clone())


# what copies hold


def test_a_copy_holds_its_tensors_until_it_is_done_and_no_longer(
    backend: CudaBackend, card: FakeCard
) -> None:
    before = card.arena_used_bytes
    source = placed(backend, torch.ones(1 << 16), "host")
    target = backend.allocate((1 << 16,), torch.float32)

    with card.streams[UP_SMALL].held():
        ticket = backend.copy_async(source, target)
        del source, target
        gc.collect()
        assert backend._copies.num_held == 1
        assert card.arena_used_bytes == before + (4 << 16)
    ticket.join()
    gc.collect()

    assert backend._copies.num_held == 0
    assert card.arena_used_bytes == before


def test_what_copies_hold_stays_short_if_nobody_joins_them(backend: CudaBackend) -> None:
    source = placed(backend, torch.ones(8), "host")

    for _ in range(50):
        backend.copy_async(source, backend.allocate((8,), torch.float32))
        backend._copies._up_small._stream.record().synchronize()

    assert backend._copies.num_held <= 1
    backend.sync()
    assert backend._copies.num_held == 0


# errors


def test_what_goes_wrong_on_the_card_is_told_by_join_and_sync(
    backend: CudaBackend, card: FakeCard
) -> None:
    source = placed(backend, torch.ones(8), "host")
    ticket = backend.copy_async(source, backend.allocate((8,), torch.float32))

    card.fail_kernel(RuntimeError("an illegal memory access"))
    card.compute.lane.drain()

    with pytest.raises(RuntimeError, match="illegal memory access"):
        ticket.join()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        backend.sync()


def test_a_card_that_is_lost_can_be_closed(backend: CudaBackend, card: FakeCard) -> None:
    backend.copy_async(
        placed(backend, torch.ones(8), "host"), backend.allocate((8,), torch.float32)
    )
    card.fail_kernel(RuntimeError("the card fell off the bus"))

    backend.close()

    assert card.is_closed
    assert card.pinned == {}


def test_a_tensor_of_another_device_is_refused(backend: CudaBackend) -> None:
    with pytest.raises(RuntimeError, match="a tensor on meta, not on privateuseone"):
        backend.copy_async(torch.empty(3, device="meta"), torch.empty(3))


def test_memory_of_finished_copies_is_found_before_an_allocation_fails() -> None:
    card = FakeCard(memory_bytes=1 << 20)
    backend = CudaBackend(card)
    source = backend.allocate((700 << 10,), torch.uint8, "host")
    target = backend.allocate((700 << 10,), torch.uint8)
    backend.copy_async(source, target)
    del target
    before = card.num_emptied

    again = backend.allocate((700 << 10,), torch.uint8)

    assert again.numel() == 700 << 10
    assert card.num_emptied == before + 1
    backend.close()


def test_every_verb_says_what_was_asked_and_what_is_free_when_memory_is_out() -> None:
    backend = CudaBackend(FakeCard(memory_bytes=1 << 20))
    x_TD, weight_FD = (placed(backend, torch.ones(n, 64), "device") for n in (900, 900))
    heads = x_TD.view(1, 225, 4, 64).transpose(1, 2)
    spec = AttentionSpec(length=225, scale=1.0, soft_cap=1.0)

    with pytest.raises(OutOfMemory, match=r"allocate was asked for 900000 bytes: \d+ of the 1048"):
        backend.allocate((900_000,), torch.uint8)
    with pytest.raises(OutOfMemory, match=r"matmul was given \(900, 64\) and \(900, 64\): \d+ of"):
        backend.matmul(x_TD, weight_FD)
    with pytest.raises(OutOfMemory, match=r"attention was given queries .* and 225 col"):
        backend.attention(heads, [heads], [heads], spec)
    with pytest.raises(OutOfMemory, match="tensors of 460800; use less --device-memory"):
        backend.allocate((900_000,), torch.uint8)
    backend.close()


# memory


def test_a_run_may_use_what_is_free_less_a_margin() -> None:
    backend = CudaBackend(FakeCard(memory_bytes=1 << 30))
    backend.close()

    assert backend.capabilities.memory_bytes == (1 << 30) - (384 << 20)


def test_the_environment_makes_a_card_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPORT_CUDA_MEMORY", "500MiB")
    backend = CudaBackend(FakeCard(memory_bytes=1 << 30))

    backend.allocate((499 << 20,), torch.uint8)
    with pytest.raises(OutOfMemory):
        backend.allocate((501 << 20,), torch.uint8)

    assert backend.capabilities.memory_bytes == (500 - 384) << 20
    backend.close()


# host memory


def test_nothing_is_pinned_before_host_memory_is_asked_for(
    backend: CudaBackend, card: FakeCard
) -> None:
    x = backend.allocate((64, 64), torch.float32)
    backend.matmul(x, x)
    assert card.pinned == {}

    backend.allocate((64,), torch.float32, "host")

    assert sum(card.pinned.values()) == pinned.SMALLEST_SLAB_BYTES


def test_copies_are_right_where_host_memory_can_not_be_pinned(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = CudaBackend(FakeCard(most_pinned_bytes=0))
    data = torch.arange(100.0)

    there = placed(backend, data, "device")
    here = [on_host(backend, there), backend.allocate((9 << 20,), torch.uint8, "host")]

    assert torch.equal(here[0], data)
    (told,) = [record.getMessage() for record in caplog.records]
    assert "are not pinned: out of memory (error 2). Copies to and from" in told
    backend.close()


def test_host_memory_outlives_the_backend(card: FakeCard) -> None:
    backend = CudaBackend(card)
    kept = backend.allocate((100,), torch.float32, "host").fill_(7)
    backend.close()

    assert set(kept.tolist()) == {7.0}
    assert len(card.pinned) == 1
    del kept
    gc.collect()
    assert card.pinned == {}


def test_closing_unpins_and_gives_torch_its_settings_back(card: FakeCard) -> None:
    backend = CudaBackend(card)
    backend.allocate((100,), torch.float32, "host")

    backend.close()

    assert card.pinned == {}
    assert card.is_closed


# attention

CASES_OF_EACH_WAY = {
    "a prompt": "causal",
    "a long prompt": "causal",
    "a page with room": "pages",
    "a prompt over pages": "masked",
    "a chunk that continues": "masked",
    "a ragged chunk": "masked",
    "a grouped chunk": "masked",
    "rows that start late together": "masked",
    "not causal": "masked",
    "window over a prompt": "masked",
    "a short chunk that continues": "pages",
    "soft-cap over a prompt": "pages",
    "slopes over a ragged chunk": "pages",
    "sinks over a prompt": "pages",
    "two queries a key": "pages",
    "window": "pages",
}


@pytest.mark.parametrize(("name", "way"), CASES_OF_EACH_WAY.items(), ids=CASES_OF_EACH_WAY.keys())
def test_each_case_goes_the_way_that_suits_it(name: str, way: str) -> None:
    problem = AttentionProblem.draw(ATTENTION_CASES[name], torch.float16)

    assert choose(problem.q_NHLE, problem.keys, problem.spec, True) == way


def _prompt(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (
        torch.zeros(2, heads[0], 40, head_dim, dtype=dtype),
        torch.zeros(2, heads[1], 64, head_dim, dtype=dtype),
    )


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "has_fused_groups", "way"),
    [
        ((4, 4), 64, torch.float16, False, "causal"),
        ((4, 2), 64, torch.float16, False, "masked"),
        ((4, 2), 64, torch.bfloat16, True, "causal"),
        ((4, 4), 64, torch.float32, True, "pages"),
        ((4, 4), 20, torch.float16, True, "pages"),
        ((4, 4), 256, torch.float16, True, "pages"),
    ],
)
def test_the_fused_kernel_gets_what_it_can_do(
    heads: tuple[int, int], head_dim: int, dtype: torch.dtype, has_fused_groups: bool, way: str
) -> None:
    q_NHLE, page = _prompt(heads, head_dim, dtype)

    for starts in (None, (0, 0)):
        spec = AttentionSpec(length=40, scale=0.1, starts=starts)
        assert choose(q_NHLE, [page], spec, has_fused_groups) == way


def test_a_masked_chunk_repeats_no_keys_and_is_computed_a_few_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[tuple[int, ...]] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(q: Tensor, keys: Tensor, values: Tensor, **options: Any) -> Tensor:
        calls.append((*q.shape, *keys.shape))
        return fused(q, keys, values, **options)

    monkeypatch.setattr(kernels, "scaled_dot_product_attention", spy)
    problem = AttentionProblem.draw(
        ATTENTION_CASES["a grouped chunk"], torch.float16
    )  # starts: 4, 0
    monkeypatch.setattr(kernels, "MASKED_BYTES", 1)

    out_NHLE = kernels.attention(
        problem.q_NHLE, problem.keys, problem.values, problem.spec, has_fused_groups=True
    )

    problem.check(out_NHLE)
    assert calls == [(1, 2, 4 * 17, 16, 1, 2, 45, 16)] * 2


def test_a_prompt_in_a_page_with_room_reads_nothing_past_its_length() -> None:
    case = AttentionCase(pages=(64,), length=40, queries=40, heads=(4, 2))
    problem = AttentionProblem.draw(case, torch.float16)

    for has_fused_groups in (True, False):
        out_NHLE = kernels.attention(
            problem.q_NHLE, problem.keys, problem.values, problem.spec, has_fused_groups
        )
        problem.check(out_NHLE)


@pytest.mark.parametrize("name", CASES_OF_EACH_WAY)
def test_no_way_lets_the_host_wait(name: str, backend: CudaBackend, card: FakeCard) -> None:
    for dtype in (torch.float16, torch.float32):
        arguments = AttentionProblem.draw(ATTENTION_CASES[name], dtype).on_device(backend)

        out_NHLE = backend.attention(*arguments)

        assert isinstance(out_NHLE, DeviceTensor)
    assert card.num_reads == 0


# opening


@pytest.mark.parametrize("strided", ["neither", "source", "destination"])
def test_torch_may_go_on_before_a_copy_is_done_only_if_no_temporary_ends_meanwhile(
    strided: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    src, dst = (
        torch.ones(4, 8)[:, :4] if strided == name else torch.ones(4, 4)
        for name in ("source", "destination")
    )
    waits: list[bool] = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten.copy_.default:
                waits.append(not (len(args) > 2 and args[2]))
            return func(*args, **(kwargs or {}))

    with Spy():
        _TorchStream(cast(Any, None)).copy(src, dst)

    assert waits == [strided != "neither"]


@pytest.mark.cuda
def test_a_real_card_pins_exactly_and_describes_itself_as_it_is() -> None:
    assert PLUGIN.describe is not None
    said = PLUGIN.describe()
    backend = CudaBackend.open()
    found = backend.capabilities
    large = backend.allocate((100 << 20,), torch.uint8, "host")

    assert large.is_pinned()
    assert backend._host.pinned_bytes == 100 << 20
    if said is not None:
        assert (said.dtypes, said.unified) == (found.dtypes, found.unified)
        assert said.memory_bytes >= found.memory_bytes
    backend.close()

"""The CPU plug-in keeps the contract, and a few promises of its own."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flexport_cpu import PLUGIN, attention, free_memory, linear, memory, packed
from flexport_cpu.backend import CpuBackend
from flexport_cpu.processor import choose_dtypes, processor_flags
from flexport_cpu.scratch import scratch
from hypothesis import given
from hypothesis import strategies as st

from flexport.backend import AttentionSpec, Backend, PackedMatrix
from flexport.testing import AttentionCase, BackendConformance, attention_in_float64
from flexport.testing.conformance.attention import ATTENTION_CASES
from flexport.testing.conformance.packed_problems import PackedProduct, Sizes
from flexport.testing.conformance.problems import AttentionProblem
from flexport.testing.conformance.tensors import on_host


class TestCpu(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PLUGIN.open()
        yield backend
        backend.close()


def test_what_it_says_without_torch_is_what_the_open_backend_says() -> None:
    assert PLUGIN.describe is not None
    said = PLUGIN.describe()
    assert said is not None
    backend = PLUGIN.open()
    found = backend.capabilities
    backend.close()

    assert (said.unified, said.page_tokens) == (found.unified, found.page_tokens)
    assert set(found.dtypes) <= set(said.dtypes)
    assert said.memory_bytes > 0


# dtypes


def test_without_matrix_instructions_for_it_bfloat16_is_not_worth_it() -> None:
    dtypes, reason = choose_dtypes(frozenset({"avx2", "fma"}))

    assert dtypes == ("float32",)
    assert "AVX2" in reason


def test_bfloat16_comes_first_where_the_processor_and_torch_have_it() -> None:
    dtypes, reason = choose_dtypes(frozenset({"avx2", "avx512f", "avx512_bf16"}))

    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert dtypes == ("bfloat16", "float32")
        assert "AVX512-BF16" in reason
    else:
        assert dtypes == ("float32",)


@given(st.sets(st.sampled_from(["avx2", "avx512f", "avx512_bf16", "amx_bf16", "f16c", "bf16"])))
def test_float16_is_never_offered_without_matrix_instructions_for_it(flags: set[str]) -> None:
    dtypes, _ = choose_dtypes(frozenset(flags))

    assert "float16" not in dtypes


# memory


def test_large_allocations_begin_on_a_huge_page_on_linux() -> None:
    tensor = memory.allocate((3 << 20,), torch.bfloat16)

    assert tensor.data_ptr() % 64 == 0
    if sys.platform == "linux":
        assert tensor.data_ptr() % memory.HUGE_PAGE_BYTES == 0


def test_free_memory_is_what_the_tightest_cgroup_leaves_page_cache_included(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("0::/jobs/mine\n")
    for name, limit, used in (("jobs", 1000, 700), ("jobs/mine", 900, 300)):
        group = tmp_path / "cgroups" / name
        group.mkdir(parents=True)
        (group / "memory.max").write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{used}\n")
        (group / "memory.stat").write_text("anon 5\ninactive_file 30\nactive_file 20\n")

    free = free_memory.cgroup_free_bytes(tmp_path / "membership", tmp_path / "cgroups")

    assert sorted(free) == [350, 650]


def test_a_cgroup_without_limit_or_without_files_limits_nothing(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("3:cpu:/a\n0::/jobs/mine\n")
    group = tmp_path / "cgroups" / "jobs"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")

    assert free_memory.cgroup_free_bytes(tmp_path / "membership", tmp_path / "cgroups") == []
    assert free_memory.cgroup_free_bytes(tmp_path / "nowhere", tmp_path / "cgroups") == []


def test_the_memory_cgroup_of_the_first_version_is_read_too(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("5:cpu,memory:/box\n1:name=systemd:/x\n")
    group = tmp_path / "cgroups" / "memory" / "box"
    group.mkdir(parents=True)
    (group / "memory.limit_in_bytes").write_text("500")
    (group / "memory.usage_in_bytes").write_text("450")
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 10\ntotal_active_file 20\n"
    (group / "memory.stat").write_text(stat)

    assert free_memory.cgroup_free_bytes(tmp_path / "membership", tmp_path / "cgroups") == [80]


def test_scratch_is_reused_by_a_thread_and_not_shared_with_another() -> None:
    mine = scratch("test", (8,), torch.float32)
    again = scratch("test", (2, 3), torch.float32)
    others: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: others.append(scratch("test", (8,), torch.float32)))
    thread.start()
    thread.join()

    assert again.data_ptr() == mine.data_ptr()
    assert others[0].data_ptr() != mine.data_ptr()


# packed weights


def test_a_weight_that_no_kernel_can_pack_comes_back_as_it_is() -> None:
    for weight in (torch.ones(4, 4, dtype=torch.float16), torch.ones(0, 4)):
        assert linear.pack(weight) is weight


def test_a_torch_without_onednn_still_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    weight_FD, x_TD = torch.randn(6, 5), torch.randn(3, 5)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)

    same_FD = linear.pack(weight_FD)
    out_TF = linear.linear(x_TD, same_FD, None)

    assert same_FD is weight_FD
    assert torch.allclose(out_TF, x_TD @ weight_FD.T, atol=1e-5)


# products with packed matrices

Times = Callable[[torch.Tensor, PackedMatrix], torch.Tensor]

VNNI = frozenset({"avx512_vnni", "avx_vnni"})


def without_the_operation(*_: object) -> torch.Tensor:
    """As torch answers for one that it has not got."""
    missing: torch.Tensor = torch.ops.onednn.an_operation_of_the_future()
    return missing


def without_the_kernel(*_: object) -> torch.Tensor:
    raise NotImplementedError("could not run on this CPU")


def saturating(x_TD: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """As pairs of products are added up in 16 bits."""
    return packed.matmul_packed(x_TD, [matrix], [None])[0].clamp(-(2**15), 2**15 - 1)


def half_by_half(x_TD: torch.Tensor, matrix: PackedMatrix) -> torch.Tensor:
    """As a kernel computes that reads four bits in another order."""
    codes, scales = matrix.parts
    swapped = replace(matrix, parts=(codes << 4 | codes >> 4, scales))
    return packed.matmul_packed(x_TD, [swapped], [None])[0]


needs_int8 = pytest.mark.skipif(
    not (VNNI & processor_flags() and torch.backends.mkldnn.is_available()),
    reason="this processor has no instructions for products of bytes, or torch none for it",
)


@needs_int8
def test_int8_is_multiplied_in_bfloat16_where_the_processor_has_instructions_for_it() -> None:
    assert packed.multiplies("int8", torch.bfloat16, 1)
    assert packed.multiplies("int8", torch.bfloat16, sys.maxsize)


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_is_multiplied_packed_but_in_bfloat16(form: str, dtype: torch.dtype) -> None:
    assert not packed.multiplies(form, dtype, 1)


def test_int4_is_decoded_where_that_is_quicker() -> None:
    assert not packed.multiplies("int4", torch.bfloat16, packed.INT4_TOKENS + 1)
    assert not packed.multiplies("int4", torch.bfloat16, sys.maxsize)
    # One way or the other, it does not depend on the number below that.
    few = {packed.multiplies("int4", torch.bfloat16, n) for n in (1, 7, packed.INT4_TOKENS)}
    assert len(few) == 1


@needs_int8
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 300])
@pytest.mark.parametrize("shape", [(64, 64), (37, 96), (130, 67), (200, 2048)], ids=str)
def test_settled_int8_gives_the_bits_that_it_gives_passing_through(
    shape: tuple[int, int], num_tokens: int
) -> None:
    problem = PackedProduct.draw(Sizes("int8", 0, *shape), num_tokens, torch.bfloat16)
    # Some tokens have outliers, and are rounded twice.
    problem.x_TD[::3, 5] *= 500
    settled = packed.settle(problem.matrix, torch.bfloat16)
    assert settled is not None

    kept_TF, passing_TF = packed.matmul_packed(
        problem.x_TD, [settled, problem.matrix], [None, None]
    )

    assert torch.equal(kept_TF, passing_TF)


@pytest.mark.parametrize("times", [without_the_operation, without_the_kernel, saturating])
def test_a_torch_that_can_not_multiply_bytes_is_not_asked_to(times: Times) -> None:
    assert not packed._has_int8(VNNI, times)


@pytest.mark.parametrize("times", [without_the_operation, without_the_kernel, half_by_half])
def test_a_torch_that_can_not_multiply_four_bits_is_not_asked_to(times: Times) -> None:
    assert not packed._has_int4(times)


@needs_int8
def test_a_torch_that_can_not_lay_bytes_out_is_not_asked_to() -> None:
    assert packed._has_int8(VNNI)
    assert not packed._has_int8(VNNI, laid_out=without_the_operation)


def test_a_processor_without_instructions_for_bytes_is_not_asked_to_multiply_them() -> None:
    assert not packed._has_int8(frozenset({"avx2", "avx512f", "avx512_bf16"}))


# attention


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that a few rows and heads already need several of each kind."""
    monkeypatch.setattr(attention, "TILE_BYTES", 256)
    monkeypatch.setattr(attention, "TILE_QUERIES", 3)
    monkeypatch.setattr(attention, "GATHER_QUERIES", 6)
    monkeypatch.setattr(attention, "GATHER_BYTES", 3000)


@pytest.mark.usefixtures("small_tiles")
@given(st.data())
def test_attention_is_the_same_however_it_is_tiled(data: st.DataObject) -> None:
    draw = data.draw
    pages = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    length = draw(st.integers(1, sum(pages)))
    num_queries = draw(st.integers(1, length))
    num_rows, num_kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    starts = st.tuples(*[st.integers(0, length - num_queries)] * num_rows)
    spec = AttentionSpec(
        length=length,
        scale=0.3,
        starts=draw(st.none() | starts),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, length + 1)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    cache_shape = (2, num_rows, num_kv_heads, sum(pages), 4)
    cache = torch.randn(cache_shape, generator=generator)
    keys, values = ([page.contiguous() for page in half.split(pages, 2)] for half in cache)
    q_shape = (num_rows, num_kv_heads * group, num_queries, 4)
    q_NHLE = torch.randn(q_shape, generator=generator)

    out_NHLE = attention.attention(q_NHLE, keys, values, spec)

    exact_NHLE, _ = attention_in_float64(q_NHLE, keys, values, spec)
    assert float((out_NHLE - exact_NHLE).abs().max()) < 1e-5


@pytest.mark.parametrize(
    ("q_shape", "page_shape", "spec"),
    [
        ((1, 2, 1, 4), (1, 2, 8, 4), AttentionSpec(length=9, scale=1.0)),
        ((1, 2, 5, 4), (1, 2, 8, 4), AttentionSpec(length=4, scale=1.0)),
        ((1, 3, 1, 4), (1, 2, 8, 4), AttentionSpec(length=4, scale=1.0)),
        ((2, 2, 1, 4), (2, 2, 8, 4), AttentionSpec(length=4, scale=1.0, starts=(0,))),
    ],
    ids=["pages too short", "more queries than columns", "heads", "starts"],
)
def test_sizes_that_contradict_each_other_are_refused(
    q_shape: tuple[int, ...], page_shape: tuple[int, ...], spec: AttentionSpec
) -> None:
    page = torch.ones(page_shape)

    with pytest.raises(ValueError, match=r"\d"):
        attention.attention(torch.ones(q_shape), [page], [page], spec)


@pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())
def test_float16_caches_are_attended_to_where_float16_is_not_worth_computing_in(
    case: AttentionCase,
) -> None:
    """The CPU may stand beside a device that computes in float16."""
    with contextlib.closing(CpuBackend()) as backend:
        problem = AttentionProblem.draw(case, torch.float16)

        problem.check(on_host(backend, problem.run(backend)))

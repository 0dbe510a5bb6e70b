"""The MPS plug-in keeps the contract: over a careless fake everywhere, and on a Mac on its GPU."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from typing import Any

import psutil
import pytest
import torch
from fake_mps_runtime import FakeRuntime
from flexport_mps import PLUGIN, linear
from flexport_mps.backend import MpsBackend
from flexport_mps.machine import (
    MARGIN_BYTES,
    MEMORY_VARIABLE,
    choose_dtypes,
    reason_not_usable,
    usable_bytes,
)
from flexport_mps.runtime import TorchRuntime
from torch import Tensor
from torch.utils import backend_registration

from flexport.backend import AttentionSpec, Backend
from flexport.errors import OutOfMemory
from flexport.testing import BackendConformance
from flexport.testing.conformance.problems import Product
from flexport.testing.conformance.tensors import on_host
from flexport.torch_ops.attention import attention

GIB = 1 << 30

needs_python_devices = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


@pytest.mark.mps
class TestMps(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        backend = PLUGIN.open()
        yield backend
        backend.close()


@pytest.mark.mps
def test_where_there_is_such_a_gpu_it_is_usable() -> None:
    assert PLUGIN.probe() is None


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine shows such a GPU")
def test_where_torch_finds_no_gpu_it_says_so() -> None:
    with pytest.raises(RuntimeError, match="finds no Metal GPU"):
        PLUGIN.open()


def test_a_virtual_macs_gpu_which_gives_no_memory_is_refused(monkeypatch) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise RuntimeError("MPS backend out of memory (MPS allocated: 0 bytes)")

    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", fail)

    with pytest.raises(RuntimeError, match=r"virtual machine.*allocated: 0 bytes"):
        TorchRuntime()


@pytest.mark.parametrize(
    ("cap_bytes", "share"), [(4 * GIB, 0.5), (20 * GIB, 1.0), (0, 1e-6)], ids=str
)
def test_a_cap_is_a_share_of_what_metal_recommends_and_never_none(
    cap_bytes, share, monkeypatch
) -> None:
    shares: list[float] = []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 * GIB)
    monkeypatch.setattr(torch.mps, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M2", raising=False)

    runtime = TorchRuntime()
    runtime.set_cap(cap_bytes)

    assert shares == [share]
    assert (runtime.name, runtime.device.type) == ("Apple M2", "mps")


@needs_python_devices
class TestMpsOnAFake(BackendConformance):
    @pytest.fixture
    def backend(self) -> Iterator[Backend]:
        runtime = FakeRuntime()
        backend = MpsBackend(runtime)
        yield backend
        backend.close()
        runtime.close()


@pytest.fixture
def runtime() -> Iterator[FakeRuntime]:
    runtime = FakeRuntime()
    yield runtime
    runtime.close()


@pytest.fixture
def backend(runtime: FakeRuntime) -> Iterator[MpsBackend]:
    backend = MpsBackend(runtime)
    yield backend
    backend.close()


# copies


@needs_python_devices
def test_both_sides_of_a_copy_are_held_until_it_is_done(backend, runtime) -> None:
    host = backend.allocate((1000,), torch.uint8, "host").fill_(7)
    device = backend.allocate((1000,), torch.uint8)
    backend.copy_async(host, device).join()
    back = backend.allocate((1000,), torch.uint8, "host")
    free_bytes = runtime.used_bytes - 1000

    with runtime.held():
        up = backend.copy_async(backend.allocate((8,), torch.uint8, "host").fill_(3), device[:8])
        # Neither its ticket nor its source is kept by anybody else.
        backend.copy_async(device + 1, back)
        del device
        gc.collect()
        held_bytes = runtime.used_bytes
    backend.sync()
    up.join()
    gc.collect()

    assert back.tolist() == [4] * 8 + [8] * 992
    assert held_bytes >= free_bytes + 2000
    assert runtime.used_bytes == free_bytes


@needs_python_devices
def test_a_copy_is_issued_and_not_waited_for(backend, runtime) -> None:
    host = backend.allocate((6,), torch.float32, "host").fill_(2)
    device = backend.allocate((6,), torch.float32)

    with runtime.held():
        ticket = backend.copy_async(host, device)
        ticket.wait()
        doubled = device * 2
        joiner = threading.Thread(target=ticket.join)
        joiner.start()
        joiner.join(0.05)
        joins = joiner.is_alive()
    joiner.join()

    assert joins
    assert doubled.tolist() == [4.0] * 6
    assert runtime.copies == [True]


@needs_python_devices
@pytest.mark.parametrize("to_device", [True, False], ids=["up", "down"])
def test_what_is_not_flat_or_not_aligned_goes_by_way_of_what_is(
    to_device, backend, runtime
) -> None:
    """Torch would fill it from a temporary that is gone, or too early, or stop the program."""

    def strided(x: Tensor) -> Tensor:
        return x[:, 1:3]

    def shifted(x: Tensor) -> Tensor:
        return x.flatten()[1:9].view(4, 2)

    data = torch.arange(16, dtype=torch.float16).view(4, 4)

    for part_of_src, part_of_dst in ((strided, shifted), (shifted, strided), (shifted, shifted)):
        homes = ["host", "device"] if to_device else ["device", "host"]
        src, dst = (backend.allocate((4, 4), torch.float16, home) for home in homes)
        for tensor, values in ((src, data), (dst, data * 0)):
            whole = backend.allocate((4, 4), torch.float16, "host").copy_(values)
            backend.copy_async(whole, tensor).join()
        backend.copy_async(part_of_src(src), part_of_dst(dst)).join()
        found = backend.allocate((4, 4), torch.float16, "host")
        backend.copy_async(dst, found).join()

        expected = data * 0
        part_of_dst(expected).copy_(part_of_src(data))
        assert torch.equal(found, expected)
    assert False in runtime.copies


@needs_python_devices
def test_a_copy_that_can_not_be_is_refused_at_once(backend) -> None:
    host = backend.allocate((3,), torch.float32, "host")

    with pytest.raises(ValueError, match="one shape and dtype"):
        backend.copy_async(host, backend.allocate((4,), torch.float32))
    with pytest.raises(ValueError, match="on meta"):
        backend.copy_async(host, host.to("meta"))


# memory


class BrokenRuntime(FakeRuntime):
    """One whose allocations do as a test says."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        super().__init__()
        self._make = make

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._make(shape, dtype)

    def empty_host(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return self._make(shape, dtype)


@pytest.fixture
def broken() -> Iterator[Callable[[Callable[..., Tensor]], MpsBackend]]:
    runtimes: list[FakeRuntime] = []

    def get(make: Callable[..., Tensor]) -> MpsBackend:
        runtimes.append(BrokenRuntime(make))
        return MpsBackend(runtimes[-1])

    yield get
    for runtime in runtimes:
        runtime.close()


@needs_python_devices
def test_host_memory_that_is_none_is_refused(broken) -> None:
    """As pinned memory was up to torch 2.12."""
    backend = broken(lambda shape, dtype: torch.empty(shape, dtype=dtype, device="meta"))

    with pytest.raises(RuntimeError, match=r"memory on meta where host memory .*181374"):
        backend.allocate((3,), torch.float32, "host")
    with pytest.raises(RuntimeError, match="where device memory"):
        backend.allocate((3,), torch.float32)


NO_ROOM = {
    "the oldest": RuntimeError(
        "MPS backend out of memory (MPS allocated: 5.56 GB, other allocations: 1.10 GB, max "
        "allowed: 6.80 GB). Tried to allocate 768.00 MB on private pool."
    ),
    "torch's own": torch.OutOfMemoryError("MPS backend out of memory"),
    "more than a buffer can be": RuntimeError("Invalid buffer size: 1048576.00 GiB"),
}


@needs_python_devices
@pytest.mark.parametrize("error", NO_ROOM.values(), ids=NO_ROOM.keys())
def test_no_room_is_told_as_out_of_memory(error, broken, monkeypatch) -> None:
    def fail(*_: object) -> Tensor:
        raise error

    backend = broken(fail)
    monkeypatch.setattr("torch.nn.functional.linear", fail)
    x = torch.ones(2, 2)

    with pytest.raises(OutOfMemory, match="24 bytes of device memory"):
        backend.allocate((2, 3), torch.float32)
    with pytest.raises(OutOfMemory, match="room for matmul"):
        backend.matmul(x, x)


@needs_python_devices
def test_another_error_of_a_kernel_stays_what_it_is(backend) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        backend.matmul(torch.ones(2, 3), torch.ones(2, 4))


@needs_python_devices
def test_memory_that_torch_keeps_makes_way_for_the_hosts(backend, runtime) -> None:
    with runtime.held():
        busy = backend.allocate((4,), torch.float32) * 2
        runtime.cached = 200 << 20
        backend.allocate((4,), torch.float32, "host")
        kept = runtime.emptied
    runtime.cached = 300 << 20
    busy = busy * 2
    backend.allocate((4,), torch.float32)
    kept_for_itself = runtime.emptied
    backend.allocate((4,), torch.float32, "host")

    assert (kept, kept_for_itself, runtime.emptied) == (0, 0, 1)


@needs_python_devices
def test_the_environment_lowers_the_cap_and_never_raises_it(monkeypatch) -> None:
    seen = []
    for text in ("", "3GiB", "3GB", "3000000000", "500 GiB"):
        monkeypatch.setenv(MEMORY_VARIABLE, text)
        runtime = FakeRuntime(recommended_bytes=16 * GIB, free_bytes=12 * GIB)
        memory_bytes = MpsBackend(runtime).capabilities.memory_bytes
        seen.append((memory_bytes, runtime.cap_bytes))
        runtime.close()

    free_bytes = int(12 * GIB * 0.9)
    assert [memory for memory, _ in seen] == pytest.approx(
        [free_bytes, 3 * GIB, 3 * 10**9, 3 * 10**9, free_bytes], abs=1
    )
    # What torch's heaps waste is beside what a run counts, and below what Metal recommends.
    assert seen[0][1] == 16 * GIB
    assert seen[1][1] == 3 * GIB + MARGIN_BYTES
    assert seen[4][1] == min(16 * GIB, seen[4][0] + MARGIN_BYTES)


@pytest.mark.parametrize("text", ["lots", "GiB", "-1", "1.5.2G", "3 XB"])
def test_a_size_that_is_none_is_refused(text) -> None:
    with pytest.raises(ValueError, match=f"FLEXPORT_MPS_MEMORY is '{text}'"):
        usable_bytes(16 * GIB, 16 * GIB, text)


def test_sizes_read_as_in_flexports_own_options() -> None:
    from flexport.units import parse_bytes

    for text in ("1g", "1 GiB", "1GB", "1.5tb", "7", "7B", "800m", "2KiB", "2 kb"):
        assert usable_bytes(10**15, 10**15, text) == parse_bytes(text)


def test_usable_memory_is_the_least_of_what_there_is_less_a_margin() -> None:
    assert usable_bytes(8 * GIB, 4 * GIB, "") == 4 * GIB - MARGIN_BYTES
    assert usable_bytes(4 * GIB, 8 * GIB, "") == 4 * GIB - MARGIN_BYTES
    assert usable_bytes(100 * GIB, 200 * GIB, "") == 90 * GIB
    assert usable_bytes(GIB, GIB, "") == 0


# what it says of itself


@needs_python_devices
def test_it_is_one_pool_that_the_host_does_not_address(backend) -> None:
    facts = backend.capabilities

    assert (facts.unified, facts.addressable, facts.keys_by_feature) == (True, False, False)
    assert "fake" in facts.name


@needs_python_devices
def test_what_it_says_without_torch_is_what_the_open_backend_says(backend) -> None:
    assert PLUGIN.describe is not None
    said, found = PLUGIN.describe(), backend.capabilities
    total_bytes = psutil.virtual_memory().total

    assert said is not None
    assert replace(said, name=found.name, memory_bytes=0) == replace(found, memory_bytes=0)
    assert said.memory_bytes <= usable_bytes(total_bytes, total_bytes, "")


@pytest.mark.parametrize(
    ("macos", "dtypes"),
    [
        ((13, 6), ("float16", "float32")),
        ((14,), ("float16", "bfloat16", "float32")),
        ((14, 0, 1), ("float16", "bfloat16", "float32")),
        ((26, 1), ("float16", "bfloat16", "float32")),
    ],
)
def test_bfloat16_is_offered_from_macos_14_on(macos, dtypes) -> None:
    found, reason = choose_dtypes(macos)

    assert found == dtypes
    assert "float16" in reason


MAC: dict[str, Any] = {
    "system": "Darwin",
    "machine": "arm64",
    "mac_ver": ("15.5", ("", "", ""), "arm64"),
}

PROBES: dict[str, tuple[dict[str, Any], str | None, str | None]] = {
    "a Mac": ({}, "2.13.0", None),
    "an old Mac and an old torch": ({"mac_ver": ("13.6", ("", "", ""), "")}, "2.9.1", None),
    "Linux": ({"system": "Linux"}, "2.13.0", "this is Linux"),
    "Windows": ({"system": "Windows"}, "2.13.0", "this is Windows"),
    "Intel": ({"machine": "x86_64"}, "2.13.0", "this Python is for x86_64"),
    "no torch": ({}, None, "torch is not installed"),
    "torch too old": ({}, "2.5.1", "torch 2.5.1 is too old: install torch 2.6"),
    "macOS too old": (
        {"mac_ver": ("12.7.6", ("", "", ""), "")},
        "2.6.0",
        "needs macOS 13.0 or newer; this is 12.7.6",
    ),
    "macOS too old for this torch": (
        {"mac_ver": ("13.7.4", ("", "", ""), "")},
        "2.10.0.dev20251008",
        "needs macOS 14.0 or newer; this is 13.7.4",
    ),
}


@pytest.mark.parametrize(("machine", "torch_version", "reason"), PROBES.values(), ids=PROBES.keys())
def test_the_probe_says_what_is_missing(machine, torch_version, reason, monkeypatch) -> None:
    def version(name: str) -> str:
        assert name == "torch"
        if torch_version is None:
            raise metadata.PackageNotFoundError(name)
        return str(torch_version)

    for name, value in {**MAC, **machine}.items():
        monkeypatch.setattr(platform, name, lambda value=value: value)
    monkeypatch.setattr(metadata, "version", version)

    found = reason_not_usable()

    assert (found is None) == (reason is None)
    assert reason is None or (found is not None and reason in found)


def test_neither_the_probe_nor_what_it_says_imports_torch() -> None:
    script = (
        "import sys\n"
        "from flexport_mps import PLUGIN\n"
        "PLUGIN.probe(), PLUGIN.describe()\n"
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# products in the shapes in which Metal's are right


@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_large_products_are_cut_and_come_out_right(with_bias, dtype, monkeypatch) -> None:
    asked: list[tuple[Tensor, Tensor]] = []
    real = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        asked.append((x, weight))
        return real(x, weight, bias)

    monkeypatch.setattr("torch.nn.functional.linear", watched)
    monkeypatch.setattr(linear, "MOST_FEATURES_IN", 12)
    monkeypatch.setattr(linear, "MOST_FEATURES_OUT", 7)
    monkeypatch.setattr(linear, "CUT_FEATURES_OUT", 3)
    draw = torch.Generator().manual_seed(0)
    for num_in, num_out, num_products in ((12, 7, 1), (12, 8, 2), (13, 3, 2), (30, 8, 9)):
        x_TD = torch.randn(5, num_in, generator=draw).to(dtype)
        wide_FD = torch.randn(num_out, num_in + 2, generator=draw).to(dtype)
        bias_F = torch.randn(num_out, generator=draw).to(dtype) if with_bias else None
        asked.clear()

        out_TF = linear.linear(x_TD, wide_FD[:, 1:-1], bias_F)

        exact_TF = x_TD.double() @ wide_FD[:, 1:-1].double().T
        exact_TF = exact_TF if bias_F is None else exact_TF + bias_F.double()
        assert out_TF.dtype is dtype
        assert float((out_TF - exact_TF).abs().max()) < 40 * torch.finfo(dtype).eps
        assert len(asked) == num_products
        for x, weight in asked:
            assert x.is_contiguous()
            assert weight.is_contiguous()
            assert x.shape[1] <= 12
            assert weight.shape[0] <= 7


@needs_python_devices
@pytest.mark.parametrize("shape", [(2, 40_000, 3), (2, 3, 70_000), (0, 3, 4)], ids=str)
def test_products_beyond_those_shapes_stay_on_the_device(shape, backend) -> None:
    num_tokens, _, num_out = shape
    problem = Product.draw(shape, torch.float16, with_bias=True)
    on_device = problem.on_device(backend)

    out_TF = backend.matmul(*on_device)

    found_TF = on_host(backend, out_TF)
    assert problem.bias_F is not None
    exact_TF = problem.x_TD.double() @ problem.weight_FD.double().T + problem.bias_F.double()
    assert found_TF.shape == (num_tokens, num_out)
    # One rounding a part of the sum, and one at the end.
    assert bool(((found_TF - exact_TF).abs() <= 2e-3 * exact_TF.abs().clamp_min(300)).all())


@needs_python_devices
def test_the_fake_has_no_float64_like_the_real_one(backend) -> None:
    with pytest.raises(TypeError, match="float64"):
        backend.allocate((3,), torch.float32).double()


@needs_python_devices
def test_a_page_wider_than_a_sum_may_be_is_cut(backend, monkeypatch) -> None:
    monkeypatch.setattr("flexport_mps.backend.MOST_FEATURES_IN", 5)
    widths: list[int] = []

    def watched(q: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], spec: Any) -> Tensor:
        widths.extend(page.shape[2] for pages in (keys, values) for page in pages)
        return attention(q, keys, values, spec)

    monkeypatch.setattr("flexport_mps.backend.attention", watched)
    page = backend.allocate((1, 1, 12, 4), torch.float32).fill_(2)

    out = backend.attention(page[:, :, :1], [page], [page], AttentionSpec(length=12, scale=1.0))

    assert widths == [5, 5, 2] * 2
    assert out.flatten().tolist() == pytest.approx([2.0] * 4)

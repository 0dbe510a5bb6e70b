"""The emulated accelerator keeps the contract, and catches what it is there to catch."""

from __future__ import annotations

import ast
import gc
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from flexport_emulated.backend import EmulatedBackend
from torch import Tensor
from torch.nn import functional
from torch.utils import backend_registration

from flexport.backend import AttentionSpec, Backend
from flexport.errors import OutOfMemory
from flexport.registry import auto_order, backends, open_backend
from flexport.testing.conformance import BackendConformance

FOLDER = Path(__file__).parent.parent / "emulated_accelerator"

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


class TestEmulated(BackendConformance):
    @pytest.fixture(params=[False, True], ids=["", "unified"])
    def backend(self, request: pytest.FixtureRequest) -> Iterator[Backend]:
        backend = EmulatedBackend(unified=request.param)
        yield backend
        backend.close()


@pytest.fixture
def open_device() -> Iterator[Callable[..., Any]]:
    """open_device(**rates): closed at the end of the test."""
    opened: list[Any] = []

    def get(**options: Any) -> Any:
        opened.append(EmulatedBackend(**options))
        return opened[-1]

    yield get
    for backend in opened:
        backend.close()


@pytest.fixture
def device(open_device: Callable[..., Any]) -> Any:
    return open_device()


def on_host(backend: Any, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    data = torch.as_tensor(values, dtype=dtype)
    host: Tensor = backend.allocate(data.shape, data.dtype, "host")
    return host.copy_(data)


def on_device(backend: Any, values: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    host = on_host(backend, values, dtype)
    made: Tensor = backend.allocate(host.shape, host.dtype)
    backend.copy_async(host, made).join()
    return made


# an address space of its own


MIXED: dict[str, Callable[[Tensor, Tensor], object]] = {
    "add": lambda device, host: device + host,
    "the other way round": lambda device, host: host * device,
    "in place": lambda device, host: device.add_(host),
    "into host memory": lambda device, host: host.add_(device),
    "copy_": lambda device, host: device.copy_(host),
    "copy_ to host": lambda device, host: host.copy_(device),
    "cat": lambda device, host: torch.cat([device, host]),
    "index": lambda device, host: device[host.long()],
    "index of host": lambda device, host: host[device.long()],
    "set": lambda device, host: device.__setitem__(slice(0, 3), host),
    "out": lambda device, host: torch.add(device, 1, out=host),
    "matmul": lambda device, host: device @ host,
    "where": lambda device, host: torch.where(device > 0, device, host),
    "layer norm": lambda device, host: functional.layer_norm(device, (3,), host),
    "meta": lambda device, host: device + host.to("meta"),
    "number in host memory": lambda device, host: host[0].add_(device[0]),
}


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("mix", MIXED.values(), ids=MIXED.keys())
def test_tensors_of_host_and_device_do_not_mix(mix, inference, device) -> None:
    with torch.inference_mode(inference):
        there, here = on_device(device, [1, 2, 3]), on_host(device, [0, 1, 2])

        with pytest.raises(RuntimeError, match=r"mixes tensors|to host memory"):
            mix(there, here)

    assert here.tolist() == [0, 1, 2]
    assert there.tolist() == [1, 2, 3]


def test_an_error_of_mixing_names_the_operation_and_the_shapes(device) -> None:
    there, here = on_device(device, [[1, 2]]), on_host(device, [1, 2])

    with pytest.raises(RuntimeError, match=r"aten\.mul.*\(1, 2\) on privateuse.*\(2,\) on cpu"):
        there * here


def test_tensors_of_two_devices_do_not_mix(open_device) -> None:
    first, second = (on_device(open_device(), [1, 2]) for _ in range(2))

    assert first.device != second.device
    with pytest.raises(RuntimeError, match="mixes tensors"):
        first + second


def test_the_host_can_not_look_at_device_memory(device) -> None:
    there = on_device(device, [1, 2])

    for look in (
        Tensor.numpy,
        torch.utils.dlpack.from_dlpack,
        lambda x: x.untyped_storage().data_ptr(),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            look(there)


def test_numbers_may_stand_beside_device_tensors(device) -> None:
    there = on_device(device, [1, 2])

    assert (there * 2 + torch.tensor(0.5)).tolist() == [2.5, 4.5]
    assert torch.where(there > 1, there, 0.0).tolist() == [0, 2]


def test_kernels_refuse_host_memory(device) -> None:
    there, here = on_device(device, [[1, 2], [3, 4]]), on_host(device, [[1, 2], [3, 4]])
    page = here.view(1, 1, 2, 2)
    spec = AttentionSpec(length=2, scale=1.0)
    sinks = AttentionSpec(length=2, scale=1.0, sinks=on_host(device, [1]))

    for arguments in ((here, there), (there, here), (there, there, here[0])):
        with pytest.raises(RuntimeError, match="copy it to the device first"):
            device.matmul(*arguments)
    q, own = there.view(1, 1, 2, 2)[:, :, :1], there.view(1, 1, 2, 2)
    for attend in ((q, [page], [own], spec), (q, [own], [page], spec), (q, [own], [own], sinks)):
        with pytest.raises(RuntimeError, match="copy it to the device first"):
            device.attention(*attend)


def test_what_torch_offers_for_any_device_works_and_is_counted(device) -> None:
    x = on_device(device, [1, 2, 3])
    uploads = device.num_uploads

    index = torch.tensor([2, 0], device=x.device)
    picked = x[index]
    moved = torch.ones(2).to(x.device)

    assert device.num_uploads == uploads + 2
    reads = device.num_reads
    assert picked.tolist() == [3, 1]
    assert (picked + moved).cpu().tolist() == [4, 2]
    assert float(moved.sum()) == 2
    assert device.num_reads == reads + 3


OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda x: (x * 2 - 1) / 3,
    "in place": lambda x: x.clone().mul_(2).add_(x),
    "a view that is written to": lambda x: x.clone().view(-1)[3:7].zero_(),
    "set": lambda x: _set(x.clone(), (0, slice(1, 3)), 7),
    "set rows": lambda x: _set(x.clone(), torch.tensor([1, 0], device=x.device), x[:2]),
    "index": lambda x: x[torch.tensor([2, 1], device=x.device)],
    "index by a list": lambda x: x[[2, 1]],
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: torch.nonzero(x > 0),
    "index_copy_": lambda x: x.new_zeros(5, 4).index_copy_(
        0, torch.tensor([4, 1, 0], device=x.device), x
    ),
    "embedding": lambda x: functional.embedding(torch.tensor([1, 1], device=x.device), x),
    "layer norm": lambda x: functional.layer_norm(x, (4,), x[0], x[1]),
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.double().logsumexp(-1),
    "topk": lambda x: x.topk(2).values,
    "max": lambda x: x.max(-1, keepdim=True)[1],
    "cumsum": lambda x: x.cumsum(-1),
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "searchsorted": lambda x: torch.searchsorted(x.cumsum(-1), x[:, :1].contiguous()),
    "bytes": lambda x: x.view(torch.uint8).view(torch.int32),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 4), 2),
    "reshape of a transpose": lambda x: x.T.reshape(2, 6),
    "unflatten": lambda x: x.unflatten(1, (2, 2)).transpose(0, 1).flatten(),
    "split and cat": lambda x: torch.cat(x.split([1, 2])[::-1], dim=0),
    "out": lambda x: torch.add(x, 1, out=torch.empty_like(x)),
    "silu": lambda x: functional.silu(x.clone(), inplace=True),
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "unique": lambda x: torch.unique((x > 0).long()),
    "masked_fill_": lambda x: x.clone().masked_fill_(x < 0, -torch.inf),
    "to a dtype": lambda x: x.to(torch.bfloat16).float(),
    "zeros": lambda x: torch.zeros(3, device=x.device) + 1,
    "full": lambda x: torch.full((2, 2), 3.0, device=x.device),
}


def _set(x: Tensor, where: Any, values: Any) -> Tensor:
    x[where] = values
    return x


@pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
@pytest.mark.parametrize("operate", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_an_operation_gives_what_it_gives_on_the_host(operate, inference, device) -> None:
    data = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode(inference):
        expected = operate(data.clone())
        found = operate(on_device(device, data))

    assert found.device != data.device
    assert found.dtype is expected.dtype
    assert torch.equal(found.cpu(), expected)


def test_a_result_is_not_resized(device) -> None:
    x, out = on_device(device, [1, 2]), device.allocate((0,), torch.float32)

    with pytest.raises(RuntimeError, match="resize"):
        torch.add(x, 1, out=out)
    with pytest.raises(RuntimeError, match="make a view"):
        x.unsqueeze_(0)


def test_an_error_of_an_operation_is_raised_where_it_is_called(device) -> None:
    x, y = on_device(device, [1, 2]), on_device(device, [1, 2, 3])

    with pytest.raises(RuntimeError, match="must match the size"):
        x + y
    with pytest.raises(IndexError):
        x.sum(3)
    assert x.tolist() == [1, 2]


# memory


def test_fresh_memory_holds_nan(device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for where in ("device", "host"):
            assert bool(device.allocate((5,), dtype, where).isnan().all())
    x = device.allocate((5,), torch.float32)
    assert bool(torch.empty_like(x).isnan().all())


def test_every_byte_alive_is_counted_once(open_device) -> None:
    device = open_device(memory_bytes=1000)
    held = device.allocate((100,), torch.float32)
    view = held[:10].view(torch.uint8)
    assert device.used_bytes == 400

    computed = held[:50] * 2
    assert device.used_bytes == 600
    held.add_(1)
    assert device.used_bytes == 600
    del held, computed
    gc.collect()
    assert device.used_bytes == 400  # a view keeps its memory

    del view
    gc.collect()
    assert device.used_bytes == 0
    assert device.peak_bytes == 600
    assert device.allocated_peak_bytes == 400


def test_more_than_there_is_is_out_of_memory(open_device) -> None:
    device = open_device(memory_bytes=1000)
    held = device.allocate((600,), torch.uint8).zero_()

    with pytest.raises(OutOfMemory, match=r"401 bytes .* 400 of 1000"):
        device.allocate((401,), torch.uint8)
    with pytest.raises(OutOfMemory):
        held + 1
    weight = held[:480].view(torch.float32).view(30, 4)
    with pytest.raises(OutOfMemory):
        device.matmul(weight, weight)
    device.allocate((5000,), torch.uint8, "host")

    assert device.used_bytes == 600


def test_where_memory_is_unified_the_hosts_counts_too(open_device) -> None:
    device = open_device(memory_bytes=1000, unified=True)
    held = device.allocate((300,), torch.uint8)
    host = device.allocate((50, 4), torch.float16, "host")
    view = host[3]

    with pytest.raises(OutOfMemory, match="300 of 1000"):
        device.allocate((301,), torch.uint8, "host")
    with pytest.raises(OutOfMemory, match="300 of 1000"):
        device.allocate((301,), torch.uint8)
    del held, host
    gc.collect()
    assert device.used_bytes == 400  # a view keeps its memory
    del view
    gc.collect()

    assert device.used_bytes == 0
    assert device.allocate((0, 3), torch.float32, "host").shape == (0, 3)


def test_a_copy_holds_its_memory_until_it_is_done(device) -> None:
    here = on_host(device, [1, 2])
    there = device.allocate((2,), torch.float32)

    with device.held("host_to_device"):
        ticket = device.copy_async(here, there)
        del there
        gc.collect()
        held_bytes = device.used_bytes
    ticket.join()
    gc.collect()

    assert held_bytes == 8
    assert device.used_bytes == 0


# lanes


def test_operations_return_before_they_are_done(device) -> None:
    x = on_device(device, [[1, 2], [3, 4]])

    with device.held("compute"):
        y = device.matmul(x, x) + 1
        y[0] = 0
        shape = y.sum(-1).shape

    assert shape == (2,)
    assert y.tolist() == [[0, 0], [12, 26]]


def test_wait_orders_compute_after_a_copy_and_does_not_block(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)

    with device.held("host_to_device"):
        ticket = device.copy_async(here, there)
        ticket.wait()
        doubled = there * 2

    assert doubled.tolist() == [2, 4]


def test_compute_does_not_wait_for_a_copy_that_nobody_waited_for(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)

    with device.held("host_to_device"):
        ticket = device.copy_async(here, there)
        too_early = (there * 2).cpu()
    ticket.join()

    assert bool(too_early.isnan().all())
    assert there.tolist() == [1, 2]


def test_a_copy_sees_the_compute_issued_before_it(device) -> None:
    x, here = on_device(device, [1, 2]), on_host(device, [0, 0])

    with device.held("compute"):
        ticket = device.copy_async(x * 2 + 1, here)
    ticket.join()

    assert here.tolist() == [3, 5]


def test_a_copy_after_a_wait_sees_the_copy_waited_for(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)
    back = on_host(device, [0, 0])

    with device.held("host_to_device"):
        device.copy_async(here, there).wait()
        ticket = device.copy_async(there, back)
    ticket.join()

    assert back.tolist() == [1, 2]


def test_copies_of_one_direction_do_not_wait_for_the_other(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)
    back = on_host(device, [0, 0])

    with device.held("host_to_device"):
        under_way = device.copy_async(here, there)
        device.copy_async(on_device_without_a_copy(device), back).join()
    under_way.join()

    assert back.tolist() == [5, 5]


def on_device_without_a_copy(backend: Any) -> Tensor:
    made: Tensor = backend.allocate((2,), torch.float32)
    return made.fill_(5)


def test_close_ends_every_thread_and_later_verbs_raise() -> None:
    device = EmulatedBackend()
    x = on_device(device, [1, 2])
    names = [t.name for t in threading.enumerate() if t.name.startswith("flexport-emulated")]

    device.close()

    assert len(names) == 4
    assert not [t for t in threading.enumerate() if t.name.startswith("flexport-emulated")]
    for call in (
        device.sync,
        lambda: device.allocate((1,), torch.float32),
        lambda: device.copy_async(x, x),
        lambda: x + 1,
        x.tolist,
    ):
        with pytest.raises(RuntimeError, match="closed"):
            call()


# rates


def test_kernels_take_the_time_that_their_flops_take(open_device) -> None:
    flops = 2 * 8 * 64 * 64
    device = open_device(flops_per_s=flops / 0.02)
    x = device.allocate((8, 64), torch.float32).fill_(1)
    weight = device.allocate((64, 64), torch.float32).fill_(1)
    device.sync()

    started_s = time.perf_counter()
    for _ in range(10):
        device.matmul(x, weight)
    issued_s = time.perf_counter() - started_s
    device.sync()
    total_s = time.perf_counter() - started_s

    assert total_s >= 0.199
    assert device.busy_s("compute") >= 0.199
    assert issued_s < total_s


def test_attention_counts_every_column_twice(open_device) -> None:
    flops = 4 * (1 * 2 * 3 * 4) * 16  # q has 24 numbers, the cache 16 columns
    device = open_device(flops_per_s=flops / 0.1)
    q = device.allocate((1, 2, 3, 4), torch.float32).fill_(1)
    page = device.allocate((1, 2, 16, 4), torch.float32).fill_(1)
    device.sync()

    started_s = time.perf_counter()
    device.attention(q, [page], [page], AttentionSpec(length=16, scale=1.0))
    device.sync()

    assert time.perf_counter() - started_s >= 0.099


def test_a_link_has_a_latency_and_a_rate(open_device) -> None:
    device = open_device(link_bytes_per_s=1e5, link_latency_s=0.03)
    here, there = on_host(device, [0] * 500), device.allocate((500,), torch.float32)

    started_s = time.perf_counter()
    tickets = [device.copy_async(here, there) for _ in range(4)]
    tickets[-1].join()
    total_s = time.perf_counter() - started_s

    assert total_s >= 4 * (0.03 + 2000 / 1e5) - 1e-3
    assert device.busy_s("host_to_device") >= 4 * (0.03 + 2000 / 1e5) - 1e-3


def test_lanes_work_beside_each_other(open_device) -> None:
    device = open_device(link_latency_s=0.1, flops_per_s=2 * 8 / 0.1)
    here, there = on_host(device, [0] * 4), device.allocate((4,), torch.float32)
    back = on_host(device, [0] * 4)
    x = device.allocate((2, 2), torch.float32).fill_(1)
    device.sync()

    started_s = time.perf_counter()
    for _ in range(5):
        device.copy_async(here, there)
        device.copy_async(x.view(4), back)
    for _ in range(5):
        device.matmul(x, x)
    device.sync()
    total_s = time.perf_counter() - started_s

    lanes = ("compute", "host_to_device", "device_to_host")
    assert total_s >= max(device.busy_s(lane) for lane in lanes) - 0.01 >= 0.49
    assert total_s < 0.9 * sum(device.busy_s(lane) for lane in lanes)


# errors


def test_the_error_of_a_copy_reaches_its_ticket_and_sync_and_is_told_once(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)
    device.fail_copy("host_to_device", 1, OSError("the link is down"))

    fine = device.copy_async(here, there)
    broken = device.copy_async(here, there)

    fine.join()
    for _ in range(2):
        with pytest.raises(OSError, match="the link is down"):
            broken.join()
    with pytest.raises(OSError, match="the link is down"):
        broken.wait()
    with pytest.raises(OSError, match="the link is down"):
        device.sync()
    device.sync()
    device.copy_async(here, there).join()
    assert there.tolist() == [1, 2]


def test_compute_that_waited_for_a_copy_that_fails_hears_of_it(device) -> None:
    here, there = on_host(device, [1, 2]), device.allocate((2,), torch.float32)
    device.fail_copy("host_to_device", 0, OSError("the link is down"))

    with device.held("host_to_device"):
        device.copy_async(here, there).wait()
        doubled = there * 2
    with pytest.raises(OSError, match="the link is down"):
        doubled.tolist()

    with pytest.raises(OSError, match="the link is down"):
        device.sync()
    device.sync()


def test_the_error_of_a_kernel_is_raised_by_whatever_comes_until_sync(device) -> None:
    x = on_device(device, [[1, 2], [3, 4]])
    device.fail_kernel(1, RuntimeError("the chip is hot"))
    calls: list[Callable[[], object]] = [
        lambda: device.allocate((1,), torch.float32),
        lambda: device.matmul(x, x),
        lambda: device.copy_async(x, x),
        lambda: x + 1,
        x.tolist,
        device.sync,
    ]

    first, second = device.matmul(x, x), device.matmul(x, x)
    device._device.compute.drain()
    for call in calls:
        with pytest.raises(RuntimeError, match="the chip is hot"):
            call()

    assert first.tolist() == [[5, 11], [11, 25]]
    assert bool(second.isnan().all())
    device.sync()


# the plug-in


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip would leave of the package's entry points, in a folder that is on the path.

    Written here and not installed, so that the tests run in a plain checkout and offline.
    """
    # pytest itself brings tomli where Python has no tomllib yet.
    toml: Any = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((FOLDER / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [
        line
        for group, entries in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("FLEXPORT_BACKEND", raising=False)


def test_the_registry_opens_it_by_its_name(installed) -> None:
    name, backend = open_backend("emulated")
    backend.close()

    assert name == "emulated"
    assert type(backend).__name__ == "EmulatedBackend"
    (listing,) = [listing for listing in backends() if listing.name == "emulated"]
    assert (listing.distribution, listing.usable) == ("flexport-emulated", True)


def test_it_imports_of_flexport_what_a_plug_in_may() -> None:
    imported: set[str] = set()
    for path in (FOLDER / "flexport_emulated").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module or "")

    of_the_core = {name for name in imported if name.split(".")[0] in ("flexport", "flexport_cpu")}
    assert of_the_core <= {"flexport.backend", "flexport.torch_ops", "flexport.errors"}


def test_auto_prefers_the_cpu(installed) -> None:
    names = [listing.name for listing in auto_order(backends())]

    assert names.index("cpu") < names.index("emulated")


def test_the_environment_sets_what_open_can_not(installed, monkeypatch) -> None:
    monkeypatch.setenv("FLEXPORT_EMULATED_MEMORY", "1e6")
    monkeypatch.setenv("FLEXPORT_EMULATED_LINK_LATENCY_S", "0.05")

    _, backend = open_backend("emulated")
    here, there = on_host(backend, [1, 2]), backend.allocate((2,), torch.float32)
    started_s = time.perf_counter()
    backend.copy_async(here, there).join()
    total_s = time.perf_counter() - started_s
    backend.close()

    assert backend.capabilities.memory_bytes == 1_000_000
    assert total_s >= 0.049


@pytest.mark.parametrize("text", ["many", "-1", "0", "nan", "inf"])
def test_a_number_in_the_environment_that_is_none_is_refused(text, monkeypatch) -> None:
    monkeypatch.setenv("FLEXPORT_EMULATED_FLOPS_PER_S", text)

    with pytest.raises(
        ValueError, match=re.escape(f"FLOPS_PER_S has to be a number above 0, got {text!r}")
    ):
        EmulatedBackend.from_environment()

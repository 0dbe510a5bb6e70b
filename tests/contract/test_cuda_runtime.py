"""The lines that ask torch.cuda, with torch.cuda taken away: what they ask for and what they make of it."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flexport_cuda.runtime import TorchRuntime

from flexport.errors import BackendUnavailable

GIB = 1 << 30


class Cudart:
    """torch.cuda.cudart() of a machine that pins up to a limit."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self) -> None:
        self.pinned: dict[int, int] = {}
        self.flags: set[int] = set()

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.flags.add(flags)
        if num_bytes > 1 << 20:
            return 2
        self.pinned[address] = num_bytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else 1

    def cudaGetErrorString(self, code: int) -> str:
        return {1: "invalid argument", 2: "out of memory"}[code]


class Machine:
    """What torch.cuda was asked."""

    def __init__(self) -> None:
        self.cudart = Cudart()
        self.current = "default stream"
        self.shares: list[float] = []
        self.num_kernels = 0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a T4 and an A100."""
    found = Machine()
    cards = [("Tesla T4", 7, 5), ("NVIDIA A100", 8, 0)]

    def properties(device: torch.device) -> Any:
        name, major, minor = cards[device.index]
        return SimpleNamespace(name=name, major=major, minor=minor, gcnArchName="gfx90a")

    def kernel(*_: Any, **__: Any) -> None:
        found.num_kernels += 1
        raise RuntimeError("CUDA error: out of memory")  # the one that was pending

    answers: dict[str, Any] = {
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_properties": properties,
        "default_stream": lambda device: "default stream",
        "current_stream": lambda device: found.current,
        "device": contextlib.nullcontext,
        "cudart": lambda: found.cudart,
        "mem_get_info": lambda device: (10 * GIB, 16 * GIB),
        "memory_allocated": lambda device: GIB,
        "set_per_process_memory_fraction": lambda share, device: found.shares.append(share),
    }
    for name, answer in answers.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(torch, "ones", kernel)
    monkeypatch.setattr(torch.version, "hip", None)
    return found


def test_a_card_says_what_it_is(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = TorchRuntime(), TorchRuntime(1)

    assert (str(first.device), first.name) == ("cuda:0", "cuda:0 (Tesla T4)")
    assert first.dtypes == (
        ("float16", "float32"),
        "Tesla T4 (7.5) has no bfloat16 matrix units",
    )
    assert (str(second.device), second.dtypes[0][0]) == ("cuda:1", "bfloat16")
    assert (first.has_fused_groups, second.has_fused_groups) == (False, True)
    assert first.memory() == (10 * GIB, 16 * GIB, GIB)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert TorchRuntime().dtypes[1] == "Tesla T4 (gfx90a) has bfloat16 matrix units"
    with pytest.raises(BackendUnavailable, match="there is no cuda:2; there are: cuda:0, cuda:1"):
        TorchRuntime(2)


def test_sums_are_in_float32_until_it_is_closed(machine: Machine) -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction

    runtime = TorchRuntime()
    assert not matmul.allow_bf16_reduced_precision_reduction
    assert not matmul.allow_fp16_reduced_precision_reduction
    runtime.close()

    assert matmul.allow_bf16_reduced_precision_reduction == before
    assert machine.shares == []


def test_a_limit_is_a_share_of_the_card_and_ends_with_it(machine: Machine) -> None:
    runtime = TorchRuntime()
    runtime.limit_memory(4 * GIB)
    runtime.limit_memory(99 * GIB)
    runtime.close()

    assert machine.shares == [0.25, 1.0, 1.0]


def test_a_refused_pin_says_why_and_leaves_no_error_pending(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = TorchRuntime()

    assert runtime.register(4096, 1 << 20) is None
    assert machine.num_kernels == 0
    assert runtime.register(8192, 2 << 20) == "out of memory (error 2)"
    assert machine.num_kernels == 1
    assert machine.cudart.flags == {1}

    runtime.unregister(4096)
    assert machine.cudart.pinned == {}
    with caplog.at_level(logging.WARNING):
        runtime.unregister(4096)
    assert "unpinning failed: invalid argument" in caplog.text


def test_it_knows_when_another_stream_is_current(machine: Machine) -> None:
    runtime = TorchRuntime()

    assert runtime.computes_in_order
    machine.current = "another stream"

    assert not runtime.computes_in_order

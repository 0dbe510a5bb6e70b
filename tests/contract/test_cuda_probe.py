"""What the CUDA plug-in says without torch: why it can't be used, and what a card is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flexport_cuda import PLUGIN, driver
from flexport_cuda.facts import amd_dtypes, bytes_from_environment, nvidia_dtypes

from flexport.errors import BackendUnavailable
from flexport.registry import describe_backend, open_backend

GIB = 1 << 30


class FakeDriver:
    """libcuda with two cards."""

    CARDS = (("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB), ("Tesla T4", (7, 5), 15 * GIB))

    def __init__(self, num_cards: int = 2, init_error: int = 0) -> None:
        self.num_cards = num_cards
        self.init_error = init_error

    def cuInit(self, flags: int) -> int:
        return self.init_error

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.num_cards
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0 if index < self.num_cards else 101

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        name.value = self.CARDS[device.value][0].encode()
        return 0

    def cuDeviceTotalMem_v2(self, total: Any, device: Any) -> int:
        total._obj.value = self.CARDS[device.value][2]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.CARDS[device.value][1][attribute - 75]
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = {100: b"no CUDA-capable device is detected"}.get(code)
        return 0 if code == 100 else 1


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """install(version, cuda, hip, driver): what is on this machine."""

    def make(
        version: str = "2.9.0",
        cuda: str | None = None,
        hip: str | None = None,
        library: FakeDriver | None = None,
    ) -> None:
        lines = f"__version__ = {version!r}\ndebug = False\n"
        lines += f"cuda: Optional[str] = {cuda!r}\nhip = {hip!r}\n"
        (tmp_path / "version.py").write_text(lines, encoding="utf-8")
        spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
        monkeypatch.setattr(driver, "find_spec", lambda name: spec)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

        def load(name: str) -> FakeDriver:
            if library is None:
                raise OSError(f"{name}: cannot open shared object file")
            return library

        monkeypatch.setattr(driver, "_load", load)

    return make


def test_without_torch_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "find_spec", lambda name: None)

    assert PLUGIN.probe() == "torch is not installed"


def test_a_torch_for_the_cpu_is_named_with_what_would_work(install: Any) -> None:
    install("2.9.0+cpu", library=FakeDriver())

    reason = PLUGIN.probe()

    assert reason is not None
    assert reason.startswith("torch 2.9.0+cpu is installed, which has no CUDA; https://pytorch.org")


def test_a_missing_driver_is_named(install: Any) -> None:
    install(cuda="12.8")

    reason = PLUGIN.probe()

    assert reason is not None
    assert "no NVIDIA driver found (" in reason
    assert "install the driver" in reason


def test_no_card_is_told_from_cards_that_are_hidden(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(cuda="12.8", library=FakeDriver(num_cards=0))

    assert PLUGIN.probe() == "the NVIDIA driver shows no card"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert PLUGIN.probe() == "the NVIDIA driver shows no card; CUDA_VISIBLE_DEVICES is ''"


@pytest.mark.parametrize(
    ("code", "text"), [(100, "no CUDA-capable device is detected"), (999, "unknown error")]
)
def test_what_the_driver_says_is_handed_on(code: int, text: str, install: Any) -> None:
    install(cuda="12.8", library=FakeDriver(init_error=code))

    assert PLUGIN.probe() == f"the NVIDIA driver says: {text} (error {code})"


def test_with_torch_driver_and_card_it_is_usable(install: Any) -> None:
    install(cuda="12.8", library=FakeDriver())

    assert PLUGIN.probe() is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has that file")
def test_amds_driver_is_a_file(
    install: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(hip="6.4.1")
    monkeypatch.setattr(driver, "AMD_DEVICE", tmp_path / "kfd")

    assert PLUGIN.probe() == f"no AMD compute driver found ({tmp_path / 'kfd'} is missing)"
    (tmp_path / "kfd").touch()
    assert PLUGIN.probe() is None
    assert PLUGIN.describe is not None
    assert PLUGIN.describe() is None


def test_the_version_file_is_read_as_torch_would_read_it() -> None:
    build = driver.torch_build()

    assert build is not None
    assert (build.version, build.cuda, build.hip) == (
        torch.__version__,
        torch.version.cuda,
        torch.version.hip,
    )


def test_a_card_is_described_by_its_number(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install(cuda="12.8", library=FakeDriver())
    monkeypatch.delenv("FLEXPORT_CUDA_MEMORY", raising=False)

    first, second = describe_backend("cuda"), describe_backend("cuda:1")

    assert first is not None
    assert second is not None
    assert first.name == "cuda:0 (NVIDIA A100-SXM4-80GB)"
    assert first.dtypes == ("bfloat16", "float16", "float32")
    assert first.memory_bytes == 80 * GIB - int(80 * GIB * 0.04)
    assert second.dtype_reason == "Tesla T4 (7.5) has no bfloat16 matrix units"
    assert second.dtypes == ("float16", "float32")
    assert describe_backend("cuda:2") is None


def test_the_environment_makes_the_described_card_smaller(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(cuda="12.8", library=FakeDriver())
    monkeypatch.setenv("FLEXPORT_CUDA_MEMORY", "16GiB")

    said = describe_backend("cuda")

    assert said is not None
    assert said.memory_bytes == 16 * GIB - int(16 * GIB * 0.04)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_opening_it_by_number_without_cuda_says_why_not() -> None:
    with pytest.raises(BackendUnavailable, match=r"'cuda:1' can't be used here: torch .* no CUDA"):
        open_backend("cuda:1")


def test_probing_imports_no_torch() -> None:
    script = (
        "import sys\nfrom flexport_cuda import PLUGIN\nPLUGIN.probe()\n"
        "import flexport_cuda.facts\nsys.exit('torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("capability", "first"),
    [((6, 1), "float16"), ((7, 5), "float16"), ((8, 0), "bfloat16"), ((12, 0), "bfloat16")],
)
def test_bfloat16_comes_first_from_ampere_on(capability: tuple[int, int], first: str) -> None:
    dtypes, reason = nvidia_dtypes("card", capability)

    assert dtypes[0] == first
    assert ("bfloat16" in dtypes) == (first == "bfloat16")
    assert f"card ({capability[0]}.{capability[1]}) has" in reason


@pytest.mark.parametrize(
    ("architecture", "first"),
    [
        ("gfx906:sramecc+:xnack-", "float16"),
        ("gfx908", "float16"),
        ("gfx90a:sramecc+:xnack-", "bfloat16"),
        ("gfx942", "bfloat16"),
        ("gfx1030", "float16"),
        ("gfx1100", "bfloat16"),
    ],
)
def test_bfloat16_comes_first_on_the_amd_cards_that_have_it(architecture: str, first: str) -> None:
    dtypes, reason = amd_dtypes("card", architecture)

    assert dtypes[0] == first
    assert architecture.partition(":")[0] in reason


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("16GiB", 16 * GIB),
        (" 1.5 gb ", GIB * 3 // 2),
        ("800m", 800 << 20),
        ("4096", 4096),
        ("2T", 1 << 41),
        ("", None),
    ],
)
def test_sizes_in_the_environment(
    text: str, num_bytes: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPORT_CUDA_MEMORY", text)

    assert bytes_from_environment("FLEXPORT_CUDA_MEMORY") == num_bytes


@pytest.mark.parametrize("text", ["much", "-1", "1e9", "16 GiB of it", "GiB"])
def test_a_size_in_the_environment_that_is_none_is_refused(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXPORT_CUDA_MEMORY", text)

    with pytest.raises(ValueError, match="FLEXPORT_CUDA_MEMORY has to be a size such as 16GiB"):
        bytes_from_environment("FLEXPORT_CUDA_MEMORY")

"""What can be known of the cards without torch: by its version file, and by asking the driver.

The driver's library is called directly (it is what torch will call, too), so that listing
backends takes milliseconds and says in words what is missing. Nothing here makes a context on a
card, which would take some of its memory.
"""

from __future__ import annotations

import ast
import ctypes
import os
import sys
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int, c_size_t, create_string_buffer
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flexport.backend import Capabilities
from flexport_cuda.facts import facts, nvidia_dtypes

__all__ = ["Card", "TorchBuild", "described", "reason_not_usable"]

GET_TORCH = "https://pytorch.org/get-started/locally has the command for one that has"

AMD_DEVICE = Path("/dev/kfd")
"""Where Linux shows that AMD's compute driver is there."""

_MAJOR, _MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchBuild:
    """The torch that is installed, as its version file has it."""

    version: str
    cuda: str | None
    hip: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One NVIDIA card, as the driver shows it to this process."""

    name: str
    capability: tuple[int, int]
    total_bytes: int


def reason_not_usable() -> str | None:
    """None if torch and the driver can use a card here, else why not."""
    build = torch_build()
    if build is None:
        return "torch is not installed"
    if build.cuda is None and build.hip is None:
        return f"torch {build.version} is installed, which has no CUDA; {GET_TORCH}"
    if build.hip is not None:
        if sys.platform == "linux" and not AMD_DEVICE.exists():
            return f"no AMD compute driver found ({AMD_DEVICE} is missing)"
        return None
    try:
        num_cards = _Driver().num_cards()
    except _DriverError as error:
        return str(error)
    if num_cards == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        return f"the NVIDIA driver shows no card{hidden}"
    return None


def described(index: int) -> Capabilities | None:
    """What an NVIDIA card says of itself; None for AMD's, which only torch can ask.

    Its memory is all that it has, since what is free needs a context to ask.
    """
    build = torch_build()
    if build is None or build.cuda is None:
        return None
    card = _Driver().card(index)
    dtypes, reason = nvidia_dtypes(card.name, card.capability)
    return facts(f"cuda:{index} ({card.name})", dtypes, reason, free_bytes=card.total_bytes)


def torch_build() -> TorchBuild | None:
    """The installed torch without importing it; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    source = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found: dict[str, Any] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Constant):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
            found.update(dict.fromkeys(names, node.value.value))
    return TorchBuild(
        version=str(found.get("__version__", "of unknown version")),
        cuda=found.get("cuda"),
        hip=found.get("hip"),
    )


class _DriverError(RuntimeError):
    """The driver is missing, or says no; the message says which."""


class _Driver:
    """NVIDIA's driver, as far as it is asked here."""

    def __init__(self) -> None:
        name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
        try:
            self._library = _load(name)
        except OSError as error:
            raise _DriverError(
                f"no NVIDIA driver found ({name} can't be loaded); install the driver of the card"
            ) from error
        self._call(self._library.cuInit, 0)

    def num_cards(self) -> int:
        """How many this process may use."""
        count = c_int()
        self._call(self._library.cuDeviceGetCount, byref(count))
        return count.value

    def card(self, index: int) -> Card:
        """The card of that number."""
        device, total, name = c_int(), c_size_t(), create_string_buffer(256)
        major, minor = c_int(), c_int()
        library = self._library
        self._call(library.cuDeviceGet, byref(device), index)
        self._call(library.cuDeviceGetName, name, len(name), device)
        self._call(library.cuDeviceTotalMem_v2, byref(total), device)
        self._call(library.cuDeviceGetAttribute, byref(major), _MAJOR, device)
        self._call(library.cuDeviceGetAttribute, byref(minor), _MINOR, device)
        return Card(
            name=name.value.decode(errors="replace"),
            capability=(major.value, minor.value),
            total_bytes=total.value,
        )

    def _call(self, function: Callable[..., int], *args: Any) -> None:
        code = function(*args)
        if code == 0:
            return
        text = c_char_p()
        known = self._library.cuGetErrorString(code, byref(text)) == 0 and text.value is not None
        said = text.value.decode(errors="replace") if known and text.value else "unknown error"
        raise _DriverError(f"the NVIDIA driver says: {said} (error {code})")


def _load(name: str) -> Any:
    """A shared library of the system."""
    return ctypes.CDLL(name)

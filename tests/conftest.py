"""What every test can count on: no network, the CPU, one meaning of a device marker, steady properties."""

from __future__ import annotations

import os

# Read when huggingface_hub is first imported; no test may wait for a network.
os.environ["HF_HUB_OFFLINE"] = "1"

# Where there is a better device than the CPU, too, a test that wants it names it.
os.environ["FLEXPORT_BACKEND"] = "cpu"

import pytest
from hypothesis import HealthCheck, settings

DEVICES = ("cuda", "mps")
"""Markers of tests that need a device, each named as torch names the device."""

# No deadline: a busy machine is not a failure. Derandomised: a red run can be run again.
settings.register_profile(
    "flexport", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("flexport")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--need",
        action="append",
        choices=DEVICES,
        default=[],
        help="fail, rather than skip, the tests that need this device and don't find it",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for device in DEVICES:
        marked = [item for item in items if item.get_closest_marker(device)]
        if not marked or device in config.getoption("--need") or _has(device):
            continue
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"needs the device {device!r}"))


def _has(device: str) -> bool:
    import torch

    try:
        # A virtual Mac shows a GPU that has no memory.
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        return False
    return True

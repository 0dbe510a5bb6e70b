"""CPU backend for flexport: the reference the other backends are compared with."""

from flexport.backend import Backend, BackendPlugin, Capabilities

__all__ = ["PLUGIN"]


def _probe() -> str | None:
    return None  # there is always a CPU


def _open() -> Backend:
    from flexport_cpu.backend import CpuBackend

    return CpuBackend()


def _describe() -> Capabilities:
    from flexport_cpu.facts import facts

    return facts()


PLUGIN = BackendPlugin(api=1, rank=10, probe=_probe, open=_open, describe=_describe)

"""MPS backend for flexport: the GPU of an Apple silicon Mac, through torch and Metal."""

from flexport.backend import Backend, BackendPlugin, Capabilities

__all__ = ["PLUGIN"]


def _probe() -> str | None:
    from flexport_mps.machine import reason_not_usable

    return reason_not_usable()


def _open() -> Backend:
    from flexport_mps.backend import MpsBackend
    from flexport_mps.runtime import TorchRuntime

    return MpsBackend(TorchRuntime())


def _describe() -> Capabilities:
    from flexport_mps.machine import facts

    return facts()


PLUGIN = BackendPlugin(api=1, rank=100, probe=_probe, open=_open, describe=_describe)

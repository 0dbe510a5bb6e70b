"""Emulated accelerator for flexport: an address space, lanes and rates of its own, in host memory.

It is there for tests, so `auto` never takes it: its rank is below the CPU's.
"""

from flexport.backend import Backend, BackendPlugin

__all__ = ["PLUGIN"]


def _probe() -> str | None:
    return None  # host memory is all it needs


def _open() -> Backend:
    from flexport_emulated.backend import EmulatedBackend

    return EmulatedBackend.from_environment()


PLUGIN = BackendPlugin(api=1, rank=1, probe=_probe, open=_open)

"""Toaster backend for flexport."""

from __future__ import annotations

import os

from flexport.backend import Backend, BackendPlugin

__all__ = ["PLUGIN"]


def _probe() -> str | None:
    if os.environ.get("TOASTER_PLUGGED_IN") == "no":
        return "the toaster is not plugged in"
    return None


def _open() -> Backend:
    from flexport_toaster.backend import ToasterBackend

    return ToasterBackend()


PLUGIN = BackendPlugin(api=1, rank=5, probe=_probe, open=_open)

"""Backends with one fault each, and the laws of the conformance suite that they break.

Each is made of a right one, which passes the whole suite elsewhere: faults of bookkeeping and of
kernels are put into the toaster, whose work is done when a verb returns; faults of order into
devices that have queues. A module here has the faults that one module of the suite is there for.
"""

from __future__ import annotations

from importlib import import_module

from broken_backends.parts import CATCHES, Catch

__all__ = ["CATCHES", "Catch"]

for _area in (
    "facts",
    "allocate",
    "copies",
    "lifetimes",
    "order",
    "errors",
    "memory",
    "matmul",
    "packed",
    "attention",
    "whole",
):
    import_module(f"broken_backends.{_area}")

"""How a torch operation runs on device tensors: in the compute lane, behind all before it.

What comes back at once is where the result will be. Its shape is found by running the operation
on meta tensors; where that can't tell (the shape depends on values), the lane is drained first
and the operation runs in the caller, as a real device would have to. Views alias: they are
views of the inner tensor, made at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexport_emulated.device_tensor import DeviceTensor, tensors_in

if TYPE_CHECKING:
    from flexport_emulated.device import Device

__all__ = ["run"]

_aten = torch.ops.aten

_FRESH = {_aten.empty_like.default, _aten.new_empty.default, _aten.new_empty_strided.default}
"""Their results hold what fresh memory holds."""

_CPU = torch.device("cpu")
_META = torch.device("meta")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What an operation's schema says of it."""

    is_view: bool
    """Its results share memory with its first tensor."""
    changes_shape: bool
    """It changes a tensor's own shape in place."""
    gives_values: bool
    """Its result is no tensor, so the host has to wait for it."""
    written: tuple[int | str, ...]
    """Places of the arguments that it writes to, and that are its results."""


@cache
def _kind(func: Any) -> _Kind:
    schema = func._schema
    aliases = [value.alias_info for value in schema.returns]
    written: list[int | str] = [
        argument.name if argument.kwarg_only else place
        for place, argument in enumerate(schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return _Kind(
        is_view=any(alias is not None and not alias.is_write for alias in aliases),
        changes_shape=torch.Tag.inplace_view in func.tags,
        gives_values=any("Tensor" not in str(value.type) for value in schema.returns),
        written=tuple(written),
    )


_whole: set[Any] = set()
"""Operations that are not made of others."""


def run(device: Device, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the operation gives; everything in it is on `device` or, where asked for, the host."""
    if func not in _whole:
        # In inference mode an operation comes here before torch has taken it to pieces.
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        _whole.add(func)
    kind = _kind(func)
    if func is _aten.detach_.default:
        return args[0]  # there are no gradients here to detach it from
    if kind.changes_shape:
        raise RuntimeError(f"{func} changes a device tensor's shape in place; make a view instead")
    if kind.is_view:
        return _view(func, args, kwargs)
    device.check(func)
    to_host = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"
    if kind.gives_values or to_host:
        return _read(device, func, args, kwargs)
    inner_args, inner_kwargs = _inner(device, args), _inner(device, kwargs)
    if kind.written:
        return _write(device, func, kind, args, kwargs, inner_args, inner_kwargs)
    return _compute(device, func, args, kwargs, inner_args, inner_kwargs)


def _view(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Views of the inner tensor's memory."""
    whole = args[0]
    found = func(whole.in_arena, *args[1:], **kwargs)
    if isinstance(found, Tensor):
        return DeviceTensor(found, whole.memory, whole.home)
    return [DeviceTensor(part, whole.memory, whole.home) for part in found]


def _read(device: Device, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Values on the host, once they are there."""
    device.settle()
    device.num_reads += 1
    with torch.inference_mode():
        found = func(*_inner(device, args), **_inner(device, kwargs))
    # A tensor of the inference mode could not be written to outside it.
    return found.clone() if isinstance(found, Tensor) else found


def _write(
    device: Device,
    func: Any,
    kind: _Kind,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inner_args: Any,
    inner_kwargs: Any,
) -> Any:
    """An operation in place, or with `out=`: its results are the tensors it was given."""
    results = [args[place] if isinstance(place, int) else kwargs[place] for place in kind.written]
    written = tensors_in(results)
    if not all(isinstance(tensor, DeviceTensor) for tensor in written):
        raise RuntimeError(f"{func} would write what was computed on the device to host memory")
    meta_args, meta_kwargs = _meta(args), _meta(kwargs)
    try:
        func(*meta_args, **meta_kwargs)
    except (RuntimeError, NotImplementedError, IndexError):
        # If it is wrong this says why, and if not then it is done.
        device.settle()
        _do(func, inner_args, inner_kwargs)
    else:
        after = [
            meta_args[place] if isinstance(place, int) else meta_kwargs[place]
            for place in kind.written
        ]
        _must_have_kept_shape(func, written, tensors_in(after))
        device.issue(lambda: _do(func, inner_args, inner_kwargs))
    for tensor in written:
        assert isinstance(tensor, DeviceTensor)
        tensor.awaits_upload = False
    num_returned = len(func._schema.returns)
    if num_returned == 0:
        return None
    return results[0] if num_returned == 1 else tuple(results[:num_returned])


def _must_have_kept_shape(func: Any, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    for tensor, meta in zip(before, after, strict=True):
        if tensor.shape != meta.shape:
            raise RuntimeError(
                f"{func} would resize its result from {tuple(tensor.shape)} to "
                f"{tuple(meta.shape)}; give it one of the right shape"
            )


def _compute(
    device: Device,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inner_args: Any,
    inner_kwargs: Any,
) -> Any:
    """An operation with results of its own."""
    try:
        shapes = func(*_meta(args), **_meta(kwargs))
    except (RuntimeError, NotImplementedError, IndexError):
        device.settle()
        device.num_reads += 1
        found = _do(func, inner_args, inner_kwargs)
        return _each(found, device.adopt)

    results = _each(shapes, lambda like: device.make(like.shape, like.stride(), like.dtype))
    if func in _FRESH:
        return results
    places = [tensor.in_arena for tensor in tensors_in(results) if isinstance(tensor, DeviceTensor)]

    def compute() -> None:
        found = _do(func, inner_args, inner_kwargs)
        with torch.inference_mode():
            for place, values in zip(places, tensors_in(found), strict=True):
                place.copy_(values)

    device.issue(compute)
    return results


def _do(func: Any, inner_args: Any, inner_kwargs: Any) -> Any:
    with torch.inference_mode():
        return func(*inner_args, **inner_kwargs)


def _each(found: Any, make: Callable[[Tensor], Any]) -> Any:
    """The same with every tensor replaced by what `make` makes of it."""
    if isinstance(found, Tensor):
        return make(found)
    if isinstance(found, list | tuple):
        return type(found)([_each(part, make) for part in found])
    return found


def _inner(device: Device, value: Any) -> Any:
    """Arguments as the lane will see them; what is on the host is what it is now."""
    if isinstance(value, DeviceTensor):
        return value.in_arena
    if isinstance(value, Tensor):
        device.num_uploads += value.dim() > 0
        return value.clone()
    if isinstance(value, torch.device):
        return _CPU
    if isinstance(value, list | tuple):
        return [_inner(device, part) for part in value]
    if isinstance(value, dict):
        return {name: _inner(device, part) for name, part in value.items()}
    return value


def _meta(value: Any) -> Any:
    """Arguments that have a shape and no values."""
    if isinstance(value, DeviceTensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
    if isinstance(value, Tensor):
        return value if value.dim() == 0 else value.to(_META)
    if isinstance(value, torch.device):
        return _META
    if isinstance(value, list | tuple):
        return [_meta(part) for part in value]
    if isinstance(value, dict):
        return {name: _meta(part) for name, part in value.items()}
    return value

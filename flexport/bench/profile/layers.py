"""The engine with layers of a usual size, and little else: what the profile looks at from outside.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads,
L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import flexport
from flexport.backend import AttentionSpec, Backend, Capabilities, Ticket
from flexport.bench.profile.timing import Effort
from flexport.torch_ops import torch_dtype

__all__ = ["DEPTH", "HEAD_DIM", "HIDDEN", "Unpacked", "open_layers", "write_layers"]

HIDDEN, HEAD_DIM = 2048, 64
"""Of TinyLlama 1.1B, of which the layers are."""

DEPTH = 2
"""Layers of the model: from the first product of one to the first of the next is one visit."""


class Unpacked:
    """A backend that is given weights as they lie in a file, wherever they come from."""

    def __init__(self, own: Backend) -> None:
        self._own = own

    @property
    def capabilities(self) -> Capabilities:
        """What the device is."""
        return self._own.capabilities

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """As the backend does."""
        return self._own.allocate(shape, dtype, where)

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """As the backend does."""
        return self._own.copy_async(src, dst)

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """As the backend does."""
        return self._own.matmul(x_TD, weight_FD, bias_F)

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """As the backend does."""
        return self._own.attention(q_NHLE, keys_NKGE, values_NKGE, spec)

    def sync(self) -> None:
        """As the backend does."""
        self._own.sync()

    def close(self) -> None:
        """The backend goes on to be used."""


def open_layers(
    backend: Backend,
    dtype: str,
    folder: Path,
    policy: flexport.Policy,
    effort: Effort,
    trace: Path | None = None,
) -> flexport.LLM:
    """The engine with the model of a folder that `write_layers` wrote."""
    memory = effort.memory_bytes // 2
    return flexport.LLM(
        folder,
        load_format="dummy",
        backend=backend,
        dtype=dtype,
        policy=policy,
        device_memory=memory,
        host_memory=None if backend.capabilities.unified else memory,
        disk_memory=memory,
        offload_dir=folder,
        trace=trace,
    )


def write_layers(dtype: str, folder: Path, effort: Effort) -> dict[str, Any]:
    """A model of DEPTH layers of TinyLlama, or of narrower ones that the pool holds; its config."""
    config = _config(dtype, effort)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return config


def _config(dtype: str, effort: Effort) -> dict[str, Any]:
    """Layers of TinyLlama, or narrower ones that the pool holds."""
    hidden = HIDDEN
    while DEPTH * 11 * hidden**2 * torch_dtype(dtype).itemsize > effort.pool_bytes:
        hidden //= 2
    heads = max(1, hidden // HEAD_DIM)
    return {
        "model_type": "llama",
        "vocab_size": 96,  # no other matrix has as many rows
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 8),
        "max_position_embeddings": 4096,
    }

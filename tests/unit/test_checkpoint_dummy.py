"""Random weights: real files, and the same numbers whatever else is in the file."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flexport.checkpoint import dummy, read_header
from flexport.checkpoint.dummy import DummyTensor, write_dummy
from flexport.errors import DiskFull, StorageError

_TENSORS: list[DummyTensor] = [
    ("bias", (300,), "bias"),
    ("wide", (64, 1000), "matrix"),
    ("norm", (300,), "norm"),
    ("tall", (1001, 3), "matrix"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_safetensors_reads_back_shapes_and_spreads(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "model.safetensors"

    places = write_dummy(path, _TENSORS, dtype, 0)
    loaded = load_file(path)

    assert places == read_header(path)
    assert {name: tuple(tensor.shape) for name, tensor in loaded.items()} == {
        name: shape for name, shape, _ in _TENSORS
    }
    assert all(tensor.dtype is getattr(torch, dtype) for tensor in loaded.values())
    assert bool((loaded["norm"] == 1).all())
    # A standard deviation of n samples is off by 1 / sqrt(2 n), 4 times that is rare enough.
    assert loaded["wide"].double().std().item() == pytest.approx(0.02, rel=4 / (2 * 64_000) ** 0.5)
    assert loaded["bias"].double().std().item() == pytest.approx(0.01, rel=4 / 600**0.5)
    assert abs(loaded["wide"].double().mean().item()) < 4 * 0.02 / 64_000**0.5


def test_a_tensor_depends_on_seed_and_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dummy, "_CHUNK_VALUES", 1000)
    write_dummy(tmp_path / "all", _TENSORS, "bfloat16", 5)
    write_dummy(tmp_path / "some", [_TENSORS[3], _TENSORS[1]], "bfloat16", 5)
    write_dummy(tmp_path / "other", [_TENSORS[1], ("wide2", (64, 1000), "matrix")], "bfloat16", 6)

    every, some, other = (load_file(tmp_path / name) for name in ("all", "some", "other"))

    assert torch.equal(every["wide"], some["wide"])
    assert torch.equal(every["tall"], some["tall"])
    assert not torch.equal(every["wide"], other["wide"])
    assert not torch.equal(other["wide2"], other["wide"])
    rows = every["wide"].reshape(-1, 1000)
    assert len({tuple(row.tolist()) for row in rows}) == 64


def test_large_tensors_start_on_pages(tmp_path: Path) -> None:
    tensors: list[DummyTensor] = [("b", (7,), "bias"), ("m", (64, 64), "matrix"),
                                  ("n", (128, 32), "matrix")]  # fmt: skip

    places = write_dummy(tmp_path / "f", tensors, "bfloat16", 0)

    assert places["m"].offset_bytes % 4096 == places["n"].offset_bytes % 4096 == 0


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)])
def test_a_failed_write_leaves_the_old_file_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    path = tmp_path / "f"
    write_dummy(path, _TENSORS[:1], "float32", 0)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(
        StorageError, match=f"KiB of random weights to .*: {os.strerror(number)}"
    ) as caught:
        write_dummy(path, _TENSORS, "float32", 0)

    assert type(caught.value) is kind
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_empty_model_is_a_valid_file(tmp_path: Path) -> None:
    assert write_dummy(tmp_path / "f", [], "float32", 0) == {}

"""The machine's ceilings, on a file and matrices small enough for a test."""

from __future__ import annotations

import json

import pytest
import torch

from flexport.bench.ceilings import Ceilings, fresh_file, matrix_rate, measure_ceilings
from flexport.models import spec_of
from flexport.registry import open_backend

TINY = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture
def backend():
    _, opened = open_backend("cpu")
    yield opened
    opened.close()


def test_ceilings_are_rates_and_survive_json(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("flexport.bench.ceilings.MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr("flexport.bench.ceilings.MEMORY_S", 0.003)
    monkeypatch.setattr("flexport.bench.ceilings.MATRIX_S", 0.003)

    found = measure_ceilings(
        backend, spec_of(TINY), "float32", tmp_path, disk_bytes=9 << 20, disk_s=0.01
    )

    rates = [found.disk_bytes_per_s, found.flops_per_s, found.memory_read_bytes_per_s]
    assert all(rate > 0 for rate in rates)
    assert found.matrix.shape in {(32, 32), (64, 32), (32, 64)}
    assert Ceilings.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_measuring_leaves_no_file(backend, tmp_path, monkeypatch):
    monkeypatch.setattr("flexport.bench.ceilings.MEMORY_BYTES", 1 << 20)

    def fail(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("flexport.bench.ceilings._engine_read", fail)

    with pytest.raises(OSError, match="gone"):
        measure_ceilings(backend, spec_of(TINY), "float32", tmp_path, disk_bytes=1 << 20)

    assert list(tmp_path.iterdir()) == []


def test_the_faster_way_to_read_is_the_disk_s_ceiling():
    data = {
        "backend": "x",
        "dtype": "float32",
        "engine_read": {"values": [1.0, 2.0, 3.0]},
        "plain_read": {"values": [4.0, 5.0, 6.0]},
        "matrix": {"flops_per_s": 1.0, "rows": 1, "shape": [1, 1], "packed": False},
        "memory_read_bytes_per_s": 1.0,
        "memory_copy_bytes_per_s": 1.0,
    }

    assert Ceilings.from_dict(data).disk_bytes_per_s == 5.0
    assert Ceilings.from_dict({**data, "plain_read": None}).disk_bytes_per_s == 2.0


def test_the_matrix_ceiling_is_the_best_of_shapes_rows_and_layouts(backend):
    found = matrix_rate(backend, [(8, 8), (128, 64)], torch.float32, rows=(1, 32), seconds=0.003)

    # A 1 x 8 x 8 product is all overhead.
    assert (found.rows, found.shape) == (32, (128, 64))


@pytest.mark.parametrize("num_bytes", [0, 1, (8 << 20) + 5])
def test_a_fresh_file_has_its_size_and_is_not_all_zeros(tmp_path, num_bytes):
    fresh_file(tmp_path / "file", num_bytes)

    data = (tmp_path / "file").read_bytes()
    assert len(data) == num_bytes
    assert num_bytes < 100 or len(set(data[:1000])) > 50

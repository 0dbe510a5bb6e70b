"""A safetensors header is believed only when everything in it agrees with the file."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flexport.checkpoint.header import MAX_HEADER_BYTES, read_header, refusal
from flexport.errors import CheckpointError

_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.int64]


def _entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _write(path: Path, entries: object, num_bytes: int) -> Path:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(num_bytes))
    return path


@settings(max_examples=40, deadline=None)
@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
        st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(_DTYPES)),
        max_size=6,
    )
)
def test_what_safetensors_writes_is_found_where_it_lies(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    made = {
        name: torch.randint(0, 100, shape).to(dtype) for name, (shape, dtype) in tensors.items()
    }
    save_file(made, path, metadata={"format": "pt"})

    found = read_header(path)

    assert set(found) == set(made)
    data = path.read_bytes()
    for name, tensor in found.items():
        assert (tensor.name, tensor.path, tensor.shape) == (name, path, tuple(made[name].shape))
        assert getattr(torch, tensor.dtype) is made[name].dtype
        stop = tensor.offset_bytes + tensor.num_bytes
        raw = made[name].reshape(-1).view(torch.uint8).tolist() if made[name].numel() else []
        assert list(data[tensor.offset_bytes : stop]) == raw


def test_unknown_dtypes_are_kept_by_name(tmp_path: Path) -> None:
    entries = {"odd": _entry(0, 3, [6], "F4"), "f8": _entry(3, 5, [2], "F8_E4M3")}
    path = _write(tmp_path / "f", entries, 5)

    found = read_header(path)

    assert (found["odd"].dtype, found["odd"].num_bytes) == ("F4", 3)
    assert found["f8"].dtype == "float8_e4m3fn"


@pytest.mark.parametrize(
    ("entries", "num_bytes", "message"),
    [
        ({"a": _entry(0, 8, [2]), "b": _entry(4, 12, [2])}, 12, "b: its bytes .* overlap .* of a"),
        ({"a": _entry(0, 8, [2]), "b": _entry(12, 20, [2])}, 20, "b: starts at .* nothing descr"),
        ({"a": _entry(0, 8, [2])}, 7, "the data ends at byte .*: 1 B are missing"),
        ({"a": _entry(0, 8, [2])}, 9, "the data ends at byte .*, but the file only at"),
        ({"a": _entry(0, 8, [3])}, 8, r"a: takes 12 bytes as F32 \[3\], but its range 0-8 has 8"),
        ({"a": _entry(8, 0, [2])}, 8, r"a: has no data_offsets, but \[8, 0\]"),
        ({"a": _entry(-8, 0, [2])}, 8, r"a: has no data_offsets, but \[-8, 0\]"),
        ({"a": _entry(0, 8, [-2])}, 8, r"a: has no shape, but \[-2\]"),
        ({"a": _entry(0, 8, [True, 2])}, 8, "a: has no shape"),
        ({"a": {**_entry(0, 8, [2]), "shape": "2"}}, 8, "a: has no shape, but '2'"),
        ({"a": {**_entry(0, 8, [2]), "dtype": 32}}, 8, "a: has no dtype, but 32"),
        ({"a": {**_entry(0, 8, [2]), "data_offsets": [0]}}, 8, "a: has no data_offsets"),
        ({"a": 3}, 8, "a: is no object with dtype, shape and data_offsets, but 3"),
        ([], 0, "is not a JSON object"),
        (b"{'a'}", 0, "is not JSON"),
        (b"\xff\xfe", 0, "is not JSON"),
        (b"[" * 100_000, 0, "is not JSON"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', 4,
         "a: occurs twice"),
    ],
)  # fmt: skip
def test_a_lie_is_told(tmp_path: Path, entries: object, num_bytes: int, message: str) -> None:
    path = _write(tmp_path / "model.safetensors", entries, num_bytes)

    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)

    assert str(path) in str(caught.value)


def test_all_problems_of_a_file_are_in_one_error(tmp_path: Path) -> None:
    entries = {"a": _entry(0, 8, [3]), "b": 3, "c": _entry(0, 8, [2]), "d": _entry(5, 1, [1])}
    path = _write(tmp_path / "f", entries, 8)

    with pytest.raises(CheckpointError) as caught:
        read_header(path)

    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == ["  - a", "  - b", "  - d"]


@pytest.mark.parametrize("content", [b"", b"1234567", struct.pack("<Q", 100) + b"{}",
                                     struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}",
                                     b"\xff" * 100])  # fmt: skip
def test_a_file_cut_in_its_header_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "f"
    path.write_bytes(content)

    with pytest.raises(CheckpointError, match=f"truncated, or no .* {len(content)} bytes"):
        read_header(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_of_a_file_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.safetensors"
    save_file({"a": torch.ones(5), "b": torch.ones(2, 3)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])

    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_header(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")

    with pytest.raises(CheckpointError, match="git lfs pull"):
        read_header(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"can't read .*nowhere: No such file"):
        read_header(tmp_path / "nowhere")


def test_a_long_list_of_problems_is_cut_and_counted() -> None:
    lines = str(refusal("bad", [f"p{index}" for index in range(50)])).splitlines()

    assert lines[0] == "bad:"
    assert lines[1:] == [*(f"  - p{index}" for index in range(20)), "  - and 30 more"]


def test_headers_are_read_without_torch() -> None:
    code = "import sys, flexport.checkpoint; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Checkpoint directories: taken as they are, and refused whole, with every problem named."""

from __future__ import annotations

import json
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file

from flexport.checkpoint import Wanted, open_checkpoint, require, unexpected
from flexport.errors import CheckpointError

_INDEX = "model.safetensors.index.json"


def _make(
    directory: Path, files: dict[str, list[str]], weight_map: dict[str, Any] | None = None
) -> Path:
    """A directory with the named tensors, each of shape (2, 3), in the named files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "opt"}')
    for file, names in files.items():
        save_file({name: torch.ones(2, 3) for name in names}, directory / file)
    if weight_map is not None:
        (directory / _INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return directory


def test_a_single_file_is_opened_in_place(tmp_path: Path) -> None:
    directory = _make(tmp_path, {"model.safetensors": ["a", "b"]})
    (directory / "generation_config.json").write_text('{"eos_token_id": 2}')

    checkpoint = open_checkpoint(str(directory))

    assert checkpoint.name == str(directory)
    assert checkpoint.config == {"model_type": "opt"}
    assert checkpoint.generation_config == {"eos_token_id": 2}
    assert {tensor.path for tensor in checkpoint.tensors.values()} == {
        directory / "model.safetensors"
    }


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    files = {"one.safetensors": ["a", "extra"], "two.safetensors": ["b"]}
    _make(tmp_path, files, {"a": "one.safetensors", "b": "two.safetensors"})

    checkpoint = open_checkpoint(str(tmp_path))

    assert {name: tensor.path.name for name, tensor in checkpoint.tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }
    assert checkpoint.generation_config == {}


def test_all_faults_of_all_shards_are_in_one_error(tmp_path: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "gone.safetensors", "c": "one.safetensors",
                  "d": "cut.safetensors"}  # fmt: skip
    _make(tmp_path, {"one.safetensors": ["a"], "cut.safetensors": ["d"]}, weight_map)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(cut.read_bytes()[:-4])

    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))

    message = str(caught.value)
    assert "gone.safetensors is missing" in message
    assert "c: model.safetensors.index.json says it is in one.safetensors" in message
    assert "4 B are missing" in message


@pytest.mark.parametrize(
    "file",
    ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors",
     "..\\x.safetensors", "C:x.safetensors", "\\\\host\\x.safetensors", "weights.bin", "", 3, None],
)  # fmt: skip
def test_a_weight_map_may_not_point_outside(tmp_path: Path, file: object) -> None:
    directory = _make(tmp_path / "d", {"ok.safetensors": ["a"]}, {"a": "ok.safetensors", "b": file})
    save_file({"b": torch.ones(1)}, tmp_path / "x.safetensors")

    with pytest.raises(
        CheckpointError, match=r"weight_map .* refused:\n  - b: in .* not a file of"
    ):
        open_checkpoint(str(directory))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    _make(tmp_path / "elsewhere", {"model.safetensors": ["a"]})
    directory = _make(tmp_path / "d", {})
    (directory / "model.safetensors").symlink_to(tmp_path / "elsewhere" / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"is a link to .*elsewhere.* copy the file"):
        open_checkpoint(str(directory))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_the_hub_caches_links_to_its_blobs_are_followed(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    directory = _make(repository / "snapshots" / "0123", {"model.safetensors": ["a"]})
    (repository / "blobs").mkdir()
    (directory / "model.safetensors").rename(repository / "blobs" / "beef")
    (directory / "model.safetensors").symlink_to("../../blobs/beef")

    checkpoint = open_checkpoint(str(directory))

    assert set(checkpoint.tensors) == {"a"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "config.json is not valid JSON"),
        ("[1]", r"config.json should hold a JSON object, but holds \[1\]"),
        (None, "has no config.json"),
    ],
)
def test_a_broken_config_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    _make(tmp_path, {"model.safetensors": ["a"]})
    (tmp_path / "config.json").unlink()
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("index", ['{"weight_map": {}}', '{"weight_map": ["a"]}', "{}", "{"])
def test_a_broken_index_is_told(tmp_path: Path, index: str) -> None:
    _make(tmp_path, {"one.safetensors": ["a"]})
    (tmp_path / _INDEX).write_text(index)

    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_checkpoint(str(tmp_path))


def test_missing_misshapen_and_non_float_tensors_are_in_one_error(tmp_path: Path) -> None:
    _make(tmp_path, {"model.safetensors": []})
    tensors = {"good": torch.ones(2), "bent": torch.ones(2, 3), "whole": torch.ones(2).long()}
    save_file(tensors, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(str(tmp_path))

    with pytest.raises(CheckpointError) as caught:
        require(
            checkpoint,
            {
                "good": Wanted(shape=(2,)),
                "bent": Wanted(shape=(3, 2)),
                "whole": Wanted(shape=(2,)),
                "gone": Wanted(shape=(4, 4)),
            },
        )

    assert str(caught.value).splitlines()[1:] == [
        "  - bent: has shape (2, 3), should have (3, 2)",
        "  - whole: is stored as int64, should be one of bfloat16, float16, float32, float64",
        "  - gone: missing, should have shape (4, 4)",
    ]


def test_what_nobody_asked_for_is_told_apart(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(_make(tmp_path, {"model.safetensors": ["b", "a", "x", "w"]})))
    wanted = {"a": Wanted(shape=(2, 3)), "b": Wanted(shape=(2, 3))}

    found = require(checkpoint, wanted)

    assert found == {name: checkpoint.tensors[name] for name in wanted}
    assert unexpected(checkpoint, wanted) == ["w", "x"]


def test_pickled_weights_are_refused_with_a_command_that_converts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flexport.testing.checkpoints import tiny_opt

    pickled = tiny_opt(tmp_path / "pickled", tokenizer=True, num_hidden_layers=1)
    state = load_file(pickled / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(state, pickled / "pytorch_model.bin")

    with pytest.raises(
        CheckpointError, match=r"only pickled weights \(pytorch_model.bin\)"
    ) as caught:
        open_checkpoint(str(pickled))
    command = next(line for line in str(caught.value).splitlines() if "python -c" in line)
    program, option, code, *arguments = shlex.split(command)
    assert (program, option, arguments) == ("python", "-c", [str(pickled), "OUT"])
    monkeypatch.setattr(sys, "argv", ["-c", str(pickled), str(tmp_path / "OUT")])
    exec(code, {})

    converted = open_checkpoint(str(tmp_path / "OUT"))
    assert {name: tensor.shape for name, tensor in converted.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items() if name != "lm_head.weight"
    }
    assert (tmp_path / "OUT" / "tokenizer.json").exists()


def test_a_directory_without_weights_is_told(tmp_path: Path) -> None:
    _make(tmp_path, {})

    with pytest.raises(CheckpointError, match=r"no weights: no model\.safetensors"):
        open_checkpoint(str(tmp_path))


@pytest.mark.parametrize("model", ["./nowhere", "/no/where", "a/b/c", "~/nowhere", "", "a b"])
def test_what_can_be_neither_a_directory_nor_a_hub_id_is_told(model: str) -> None:
    with pytest.raises(CheckpointError, match=r"no directory .* no hub id"):
        open_checkpoint(model)


def test_a_revision_of_a_local_directory_is_refused(tmp_path: Path) -> None:
    _make(tmp_path, {"model.safetensors": ["a"]})

    with pytest.raises(CheckpointError, match="--revision v2 is for hub ids"):
        open_checkpoint(str(tmp_path), "v2")


class _Hub:
    """A hub with one repository: fetches by pattern what a real snapshot would."""

    def __init__(self, remote: Path, snapshot: Path) -> None:
        self.remote = remote
        self.snapshot = snapshot
        self.revisions: list[str | None] = []

    def __call__(
        self,
        repo_id: str,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
    ) -> str:
        self.revisions.append(revision)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for path in self.remote.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                (self.snapshot / path.name).write_bytes(path.read_bytes())
        return str(self.snapshot)


def test_of_a_hub_repository_only_what_is_needed_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"m-1.safetensors": ["a"], "m-2.safetensors": ["b"], "consolidated.safetensors": ["a"]}
    remote = _make(tmp_path / "remote", files, {"a": "m-1.safetensors", "b": "m-2.safetensors"})
    for name in ("pytorch_model.bin", "tokenizer.json", "chat_template.jinja", "merges.txt"):
        (remote / name).write_bytes(b"{}")
    hub = _Hub(remote, tmp_path / "models--a--b" / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)

    checkpoint = open_checkpoint("a/b", "main")

    assert checkpoint.name == "a/b"
    assert set(checkpoint.tensors) == {"a", "b"}
    assert hub.revisions == ["main", "c0ffee"]
    assert {path.name for path in hub.snapshot.iterdir()} == {
        "config.json", _INDEX, "m-1.safetensors", "m-2.safetensors", "tokenizer.json",
        "chat_template.jinja", "merges.txt",
    }  # fmt: skip


def test_a_hub_repository_of_pickles_gets_the_command_with_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = _make(tmp_path / "remote", {})
    (remote / "pytorch_model.bin").write_bytes(b"")
    hub = _Hub(remote, tmp_path / "models--a--b" / "snapshots" / "c0ffee")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)

    with pytest.raises(CheckpointError, match=r'a/b has no model.safetensors .*\n.* "a/b" OUT\n'):
        open_checkpoint("a/b")


def test_without_network_and_cache_it_is_said_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    with pytest.raises(CheckpointError, match=r"no directory nobody/nothing.*`hf download nobody"):
        open_checkpoint("nobody/nothing")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (hub_errors.GatedRepoError, "is gated on the hub: .* HF_TOKEN"),
        (hub_errors.RevisionNotFoundError, "has no revision 'v9' on the hub"),
        (hub_errors.RepositoryNotFoundError, "no such model on the hub; .* HF_TOKEN"),
        (ConnectionError, "can't fetch a/b from the hub: it broke"),
        (hub_errors.HFValidationError, "can't fetch a/b from the hub: it broke"),
    ],
)
def test_the_hubs_errors_are_said_in_our_words(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        error = kind.__new__(kind)  # their own arguments are responses, and change with versions
        error.args = ("it broke\nand more",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)

    with pytest.raises(CheckpointError, match=message):
        open_checkpoint("a/b", "v9")

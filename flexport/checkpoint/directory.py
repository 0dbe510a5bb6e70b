"""A Hugging Face directory as it is on disk: its config, and where each tensor's bytes lie.

The bytes stay where they are; a tensor is a range of a safetensors file. Whatever is wrong with a
checkpoint is found here, before a run starts, and listed in one error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from flexport.checkpoint.header import FLOAT_DTYPES, read_header, refusal
from flexport.checkpoint.hub import fetch
from flexport.errors import CheckpointError
from flexport.records import FileTensor

__all__ = [
    "Checkpoint",
    "Wanted",
    "content",
    "open_checkpoint",
    "require",
    "same_values",
    "unexpected",
]

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CONVERT = (
    "import sys; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
    "a, b = sys.argv[1:]; M.from_pretrained(a, torch_dtype='auto').save_pretrained(b); "
    "T.from_pretrained(a).save_pretrained(b)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model's files: configs as plain data, tensors as ranges of files."""

    name: str
    """As the user asked for it."""
    directory: Path
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tensors: Mapping[str, FileTensor]


def open_checkpoint(model: str, revision: str | None = None) -> Checkpoint:
    """The checkpoint of a local directory or a hub id, every header checked.

    A hub id is downloaded, or taken from the cache that Hugging Face's own tools use. Raises
    CheckpointError.
    """
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"--revision {revision} is for hub ids, but {model} is a local directory"
            )
    else:
        directory = fetch(
            model, revision, shards_of=lambda index: sorted(set(_weight_map(index).values()))
        )
    config = read_object(directory / "config.json")
    generation_config = {}
    if (directory / "generation_config.json").exists():
        generation_config = read_object(directory / "generation_config.json")
    return Checkpoint(
        name=model,
        directory=directory,
        config=config,
        generation_config=generation_config,
        tensors=_tensors(directory),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a tensor has to be."""

    shape: tuple[int, ...]
    dtypes: frozenset[str] | None = None
    """None: any float."""


def require(checkpoint: Checkpoint, wanted: Mapping[str, Wanted]) -> dict[str, FileTensor]:
    """The tensors named in `wanted`, each of the shape and dtype given there.

    Raises CheckpointError, which lists every one that is missing, misshapen or of another dtype.
    """
    problems = []
    for name, each in wanted.items():
        shape, dtypes = each.shape, each.dtypes or FLOAT_DTYPES
        tensor = checkpoint.tensors.get(name)
        if tensor is None:
            problems.append(f"{name}: missing, should have shape {tuple(shape)}")
            continue
        if tensor.shape != tuple(shape):
            problems.append(f"{name}: has shape {tensor.shape}, should have {tuple(shape)}")
        if tensor.dtype not in dtypes:
            problems.append(
                f"{name}: is stored as {tensor.dtype}, should be one of {', '.join(sorted(dtypes))}"
            )
    if problems:
        raise refusal(
            f"the tensors of {checkpoint.name} are not those that its config.json asks for",
            problems,
        )
    return {name: checkpoint.tensors[name] for name in wanted}


def unexpected(checkpoint: Checkpoint, wanted: Mapping[str, object]) -> list[str]:
    """The names in the checkpoint that are not in `wanted`, sorted."""
    return sorted(set(checkpoint.tensors) - set(wanted))


def content(tensor: FileTensor) -> bytes:
    """All bytes of a tensor; for small ones."""
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset_bytes)
        return file.read(tensor.num_bytes)


def same_values(one: FileTensor, other: FileTensor) -> bool:
    """Whether two tensors are equal, bit by bit; reads no further than where they differ."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.path.open("rb") as file, other.path.open("rb") as other_file:
        file.seek(one.offset_bytes)
        other_file.seek(other.offset_bytes)
        left_bytes = one.num_bytes
        while left_bytes:
            size = min(left_bytes, _COMPARED_BYTES)
            if file.read(size) != other_file.read(size):
                return False
            left_bytes -= size
    return True


_COMPARED_BYTES = 1 << 20
"""Read of each at once."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent} has no {path.name}; a Hugging Face model directory has one"
        ) from error
    except OSError as error:
        raise CheckpointError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} should hold a JSON object, but holds {value!r:.80}")
    return value


def _tensors(directory: Path) -> dict[str, FileTensor]:
    if (directory / SINGLE_FILE).exists():
        return read_header(_inside(directory, SINGLE_FILE))
    if (directory / INDEX_FILE).exists():
        return _sharded(directory)
    raise _no_weights(directory)


def _sharded(directory: Path) -> dict[str, FileTensor]:
    weight_map = _weight_map(directory / INDEX_FILE)
    shards: dict[str, dict[str, FileTensor]] = {}
    problems: list[str] = []
    for file in dict.fromkeys(weight_map.values()):
        found = _shard(directory, file)
        if isinstance(found, CheckpointError):
            problems.append(str(found))
        else:
            shards[file] = found
    tensors = {}
    for name, file in weight_map.items():
        if file not in shards:
            continue
        if name in shards[file]:
            tensors[name] = shards[file][name]
        else:
            problems.append(f"{name}: {INDEX_FILE} says it is in {file}, but it is not there")
    if problems:
        raise refusal(f"the shards of {directory} are not complete", problems)
    return tensors


def _shard(directory: Path, file: str) -> dict[str, FileTensor] | CheckpointError:
    try:
        return read_header(_inside(directory, file))
    except CheckpointError as error:
        return error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor names and the files they are in, no file outside the directory."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map")
    problems = [
        f"{name}: in {file!r:.80}, which is not a file of this directory"
        for name, file in weight_map.items()
        if not isinstance(file, str) or not _is_local(file)
    ]
    if problems:
        raise refusal(f"the weight_map of {index} is refused", problems)
    return weight_map


def _is_local(file: str) -> bool:
    """Whether a relative path stays below its start, by the rules of any operating system."""
    if not file.endswith(".safetensors"):
        return False
    return all(
        not path.anchor and not path.drive and ".." not in path.parts
        for path in (PurePosixPath(file), PureWindowsPath(file))
    )


def _inside(directory: Path, file: str) -> Path:
    """The path of a file of the directory, which may be a link only into the hub's own cache."""
    path, root = directory / file, directory.resolve()
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the download or copy was not complete")
    real = path.resolve()
    allowed = [root]
    if (
        root.parent.name == "snapshots"
    ):  # <repository>/snapshots/<commit>/ links to <repository>/blobs/
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link to {real}, outside its directory; copy the file instead"
        )
    return path


def _no_weights(directory: Path) -> CheckpointError:
    pickled = sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern))
    source = directory if pickled else _hub_id(directory)
    # Double quotes are understood by every shell, cmd.exe's included.
    convert = f'python -c "{_CONVERT}" "{source}" OUT'
    if pickled:
        return CheckpointError(
            f"{directory} has only pickled weights ({', '.join(pickled[:3])}), which can run code "
            f"when they are read; convert them once with\n  {convert}\nand use OUT"
        )
    if source:
        return CheckpointError(
            f"{source} has no {SINGLE_FILE} or {INDEX_FILE} on the hub, or not in the local cache; "
            "if all its weights are pickled (*.bin), which can run code when they are read, convert "
            f"them once with\n  {convert}\nand use OUT"
        )
    return CheckpointError(f"{directory} has no weights: no {SINGLE_FILE} and no {INDEX_FILE}")


def _hub_id(directory: Path) -> str:
    """The id of the repository of a directory in the hub's cache; else an empty string."""
    parent = directory.parent
    if parent.name != "snapshots" or not parent.parent.name.startswith("models--"):
        return ""
    return parent.parent.name.removeprefix("models--").replace("--", "/")

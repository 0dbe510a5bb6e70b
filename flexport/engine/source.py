"""Where a model comes from: the embedded demo, a directory, a hub id, or made-up weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from flexport.checkpoint.directory import (
    Checkpoint,
    Wanted,
    content,
    open_checkpoint,
    read_object,
    require,
    same_values,
    unexpected,
)
from flexport.checkpoint.header import refusal
from flexport.codecs.compressed import Compressed
from flexport.codecs.layout import Format, Known
from flexport.codecs.published import formats_of
from flexport.demo import MODEL_DIR
from flexport.engine.stored import Stored, TensorSize, find, in_file, packed_layout
from flexport.errors import CheckpointError, UnsupportedModel
from flexport.models import ModelSpec, known_config, known_names, spec_of
from flexport.models.spec import Layer
from flexport.models.tensors import TensorSpec, layer_tensors, owned_tensors
from flexport.records import FileTensor
from flexport.units import VALUE_BYTES

__all__ = ["Source", "open_source"]

_log = logging.getLogger(__name__)

IGNORED_SUFFIXES = (
    "lm_head.weight",
    "embed_out.weight",
    ".attn.bias",
    ".attn.causal_mask",
    ".attention.bias",
    ".masked_bias",
    "rotary_emb.inv_freq",
)
"""Tensors that published checkpoints carry along and that hold nothing of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A model before any weight is read."""

    name: str
    spec: ModelSpec
    files: Mapping[str, FileTensor] | None
    """Where each tensor lies; None if the weights have to be made up first."""
    directory: Path | None
    """Where the tokenizer is."""
    packings: tuple[Format, ...] = ()
    """How the checkpoint may pack its matrices."""

    def stored(
        self,
        tensor: TensorSpec,
        files: Mapping[str, FileTensor],
        form: Compressed | None = None,
    ) -> Stored:
        """How `files` store a tensor: its own or made up ones, and those that are packed as `form`."""
        return _find(self.spec, tensor, files, self.packings, form).placed(files)

    def packed(self) -> list[Stored]:
        """Its packed matrices."""
        if self.files is None or not self.packings:
            return []
        layers = range(self.spec.num_schedule_layers)
        every = (t for layer in layers for t in owned_tensors(self.spec, layer))
        return [own for t in every for own in (self.stored(t, self.files),) if own.is_packed]

    def size(
        self,
        tensor: TensorSpec,
        dtype: str,
        form: Compressed | None = None,
        *,
        decodes: bool = True,
    ) -> TensorSize:
        """What a tensor takes where, if `dtype` is computed in and it is packed as `form`.

        `decodes` is whether what is packed so is ever decoded.
        """
        decoded_bytes = tensor.num_values * VALUE_BYTES[dtype]
        layout = None if form is None else packed_layout(tensor, form)
        if layout is not None:
            num_bytes = layout.num_bytes
            return TensorSize(
                disk_bytes=num_bytes,
                near_bytes=num_bytes,
                scratch_bytes=decoded_bytes if decodes else 0,
                num_cuts=-(-layout.shape[0] // layout.rows_per_cut),
                num_parts=len(layout.parts),
            )
        if self.files is None:
            return TensorSize(disk_bytes=decoded_bytes, near_bytes=decoded_bytes)
        stored = self.stored(tensor, self.files)
        if stored.is_packed:
            return TensorSize(
                disk_bytes=stored.num_bytes,
                near_bytes=stored.num_bytes,
                scratch_bytes=decoded_bytes,
                num_cuts=-(-stored.shape[0] // stored.layout.rows_per_cut),
                num_parts=len(stored.layout.parts),
                whole_bytes=stored.whole_bytes,
            )
        near_bytes = stored.num_bytes if stored.is_exact else decoded_bytes
        return TensorSize(disk_bytes=stored.num_bytes, near_bytes=near_bytes)

    @property
    def file_dtype(self) -> str | None:
        """The dtype of most of the plain weights, by bytes."""
        if self.files is None:
            return None
        sizes: dict[str, int] = {}
        for file in self.files.values():
            if file.dtype in VALUE_BYTES:
                sizes[file.dtype] = sizes.get(file.dtype, 0) + file.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def make_up(self, directory: Path, dtype: str, seed: int) -> dict[str, FileTensor]:
        """Write seeded random weights, and say where each tensor lies.

        All decoder layers of one kind share the bytes of one, so that a 175B model needs 4 GB of disk; what
        a run reads and computes is the same.
        """
        from flexport.checkpoint.dummy import DummyKind, write_dummy  # and torch

        first_of: dict[Layer, int] = {}
        for index, layer in enumerate(self.spec.layers, start=1):
            first_of.setdefault(layer, index)
        written_layers = [0, *first_of.values(), self.spec.head_layer]
        wanted = {
            t.names[0]: t for layer in written_layers for t in owned_tensors(self.spec, layer)
        }
        kinds: dict[str, DummyKind] = {
            "table": "matrix", "matrix": "matrix", "operand": "matrix", "bias": "bias"
        }  # fmt: skip
        written = write_dummy(
            directory / "dummy.safetensors",
            [
                (name, t.file_shape, "norm" if _is_norm_weight(t) else kinds.get(t.kind, "bias"))
                for name, t in wanted.items()
            ],
            dtype,
            seed,
        )
        files = dict(written)
        for index, layer in enumerate(self.spec.layers, start=1):
            likes = layer_tensors(self.spec, first_of[layer])
            for tensor, like in zip(layer_tensors(self.spec, index), likes, strict=True):
                files[tensor.names[0]] = written[like.names[0]]
        return files


def open_source(
    model: str | None, revision: str | None, load_format: Literal["auto", "dummy"]
) -> Source:
    """The model asked for; None is the embedded demo. Reads configs and headers.

    Of the weights it reads a head that may be the token table's copy, and nothing else. Raises
    CheckpointError and UnsupportedModel.
    """
    if load_format == "dummy":
        return _dummy(model)
    checkpoint = open_checkpoint(str(MODEL_DIR) if model is None else model, revision)
    spec = spec_of(checkpoint.config, checkpoint.generation_config)
    packings = formats_of(checkpoint.config)
    spec = _as_tied(spec, checkpoint, packings)
    wanted: dict[str, Wanted] = {}
    known: list[Known] = []
    for layer in range(spec.num_schedule_layers):
        for tensor in owned_tensors(spec, layer):
            layout = _find(spec, tensor, checkpoint.tensors, packings).layout
            known += layout.known
            for part in layout.parts:
                wanted[part.name] = Wanted(shape=in_file(part, tensor), dtypes=part.dtypes)
    files = require(checkpoint, wanted)
    beside = {each.name for each in known} - set(wanted)
    _check(checkpoint, [each for each in known if each.name in beside])
    others = [name for name in unexpected(checkpoint, wanted) if name not in beside]
    _tell_of(checkpoint, [name for name in others if name.startswith(spec.unused)])
    ignored = (*IGNORED_SUFFIXES, *(end for packing in packings for end in packing.unused))
    extra = [
        name for name in others if not name.startswith(spec.unused) and not name.endswith(ignored)
    ]
    if extra:
        raise UnsupportedModel(
            f"{checkpoint.name} has {len(extra)} tensors that its family {spec.family!r} has no "
            f"place for, e.g. {', '.join(extra[:5])}; computing without them would be wrong"
        )
    return Source(
        name="flexport-demo" if model is None else checkpoint.name,
        spec=spec,
        files=files,
        packings=packings,
        directory=checkpoint.directory,
    )


def _find(
    spec: ModelSpec,
    tensor: TensorSpec,
    names: Mapping[str, FileTensor],
    packings: Sequence[Format],
    form: Compressed | None = None,
) -> Stored:
    """How these tensors store one of the model; a tied head is read by rows, and so never packed."""
    is_table = spec.tied_head and tensor.slot == "head.weight"
    return find(tensor, names, () if is_table else packings, form)


def _check(checkpoint: Checkpoint, known: Sequence[Known]) -> None:
    """Raise CheckpointError if a tensor that would be left out holds something else."""
    problems = []
    for each in known:
        tensor = checkpoint.tensors[each.name]
        if each.group is None:
            if not each.is_held_by(content(tensor)):
                problems.append(f"{each.name}: should be all 0, as the model has no such tensor")
        elif tensor.dtype != "int32" or not each.is_held_by(content(tensor)):
            problems.append(
                f"{each.name}: rows are not in groups of {each.group} neighbours, as its config has "
                "it; if they are in act order, desc_act should be true there"
            )
    if problems:
        raise refusal(f"the tensors of {checkpoint.name} contradict its config.json", problems)


def _as_tied(spec: ModelSpec, checkpoint: Checkpoint, packings: Sequence[Format]) -> ModelSpec:
    """The spec, its head no longer tied if the checkpoint has one that differs from the token table.

    A packed one does.

    That is how transformers takes a config that says otherwise.
    """
    if not spec.tied_head:
        return spec
    plain = [name for name in spec.names["head"] if f"{name}.weight" in checkpoint.tensors]
    shape = (spec.vocab_size, spec.embed_size)
    packed = [
        name
        for name in spec.names["head"]
        if any(each.layout(f"{name}.weight", shape, checkpoint.tensors) for each in packings)
    ]
    names = [*(name for name in plain if name not in packed), *packed]
    if len(names) < 2:
        return spec
    table, head = names[0], names[-1]
    if not packed and same_values(
        checkpoint.tensors[f"{table}.weight"], checkpoint.tensors[f"{head}.weight"]
    ):
        return spec
    own = {**spec.names, "tokens": (table,), "head": (head,)}
    return replace(spec, tied_head=False, names=own)


def _tell_of(checkpoint: Checkpoint, unused: list[str]) -> None:
    if unused:
        parts = sorted({name.removeprefix("model.").split(".")[0] for name in unused})
        _log.warning(
            "%s: %d tensors are no part of the language model that is run, and are left out (%s)",
            checkpoint.name,
            len(unused),
            ", ".join(parts),
        )


def _dummy(model: str | None) -> Source:
    if model is None:
        raise CheckpointError("--load-format dummy needs --model, e.g. --model facebook/opt-1.3b")
    config: Mapping[str, Any] | None = known_config(model)
    directory = Path(model).expanduser()
    if config is None and (directory / "config.json").is_file():
        config = read_object(directory / "config.json")
    if config is None:
        raise CheckpointError(
            f"--load-format dummy knows no shapes of {model!r}: it is no directory with a "
            f"config.json, and not one of the {len(known_names())} models that `flexport models` lists"
        )
    return Source(name=model, spec=spec_of(config), files=None, directory=None)


def _is_norm_weight(tensor: TensorSpec) -> bool:
    return tensor.kind == "norm" and tensor.slot.endswith(".weight")

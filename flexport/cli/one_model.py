"""One model for `flexport models`: what it is, what it takes, and whether its checkpoint is whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from flexport.checkpoint.directory import read_object
from flexport.engine.source import Source, open_source
from flexport.engine.stored import Stored
from flexport.errors import CheckpointError, UnsupportedModel, UsageError
from flexport.models import known_config, known_names, spec_of, summary
from flexport.units import format_bytes, format_count

__all__ = ["as_text", "look_at"]


def look_at(model: str) -> dict[str, Any]:
    """The summary of a known model or of a directory's, and of the latter also its "checkpoint".

    Raises UsageError for what is neither, UnsupportedModel and CheckpointError for a config that
    can't be run or read.
    """
    directory = Path(model).expanduser()
    if not directory.is_dir():
        config = known_config(model)
        if config is None:
            raise _unknown(model)
        return {"model": model, **summary(spec_of(config))}
    try:
        source = open_source(model, None, "auto")
    except (CheckpointError, UnsupportedModel) as error:
        # If the config itself is at fault, there is no more to say than that.
        spec = spec_of(read_object(directory / "config.json"))
        checkpoint: dict[str, Any] = {"complete": False, "reason": str(error)}
    else:
        spec, checkpoint = source.spec, _checkpoint(source)
    return {"model": model, **summary(spec), "checkpoint": checkpoint}


def _unknown(model: str) -> UsageError:
    names = {name.rpartition("/")[2].lower(): name for name in known_names()}
    close = get_close_matches(model.rpartition("/")[2].lower(), names)
    hint = f"; close to it: {', '.join(names[name] for name in close)}" if close else ""
    return UsageError(
        f"{model!r} is no directory and none of the {len(names)} models that are known by name"
        f"{hint}; `flexport models` lists them"
    )


def _checkpoint(source: Source) -> dict[str, Any]:
    assert source.files is not None
    return {
        "complete": True,
        "num_bytes": sum(file.num_bytes for file in source.files.values()),
        "dtype": source.file_dtype,
        "packing": _packing(source.packed()),
    }


def _packing(packed: Sequence[Stored]) -> dict[str, Any] | None:
    """In which forms matrices are packed, and what one of their numbers takes; None if none is."""
    if not packed:
        return None
    forms = {own.format.name: None for own in packed if own.format is not None}
    num_bits = 8 * sum(own.num_bytes for own in packed)
    return {
        "forms": list(forms),
        "bits_per_weight": round(num_bits / sum(own.tensor.num_values for own in packed), 2),
    }


def as_text(facts: Mapping[str, Any], about: str) -> str:
    """The same for people: a line for each thing that one asks."""
    rows = [
        ("family", f"{facts['family']} ({about})"),
        ("parameters", _parameters(facts)),
        ("weights", f"{format_bytes(facts['weights_bytes'])} in 16 bits"),
        ("cache", _cache(facts)),
        ("context", f"{facts['context_tokens']} tokens; it knows {facts['vocabulary']}"),
        ("layers", f"{facts['layers']}, of {facts['hidden_size']} features"),
        *((f"  {kind['layers']} ×", _layer(kind)) for kind in facts["kinds"]),
    ]
    if "checkpoint" in facts:
        rows.append(("checkpoint", _state(facts["checkpoint"])))
    width = max(len(name) for name, _ in rows)
    return "\n".join([facts["model"], *(f"  {name.ljust(width)}  {text}" for name, text in rows)])


def _parameters(facts: Mapping[str, Any]) -> str:
    every, active = facts["parameters"], facts["active_parameters"]
    passed = "" if active == every else f", of which a token meets {format_count(active)}"
    return format_count(every) + passed


def _cache(facts: Mapping[str, Any]) -> str:
    """Bytes of a token, and which of them go when it leaves a window."""
    in_windows: dict[int, int] = {}
    for kind in facts["kinds"]:
        window = kind["attention"]["window_tokens"]
        if window is not None:
            of_kind = kind["layers"] * kind["kv_bytes_per_token"]
            in_windows[window] = in_windows.get(window, 0) + of_kind
    every = f"{format_bytes(facts['kv_bytes_per_token'])} a token in 16 bits"
    capped = [
        f"{format_bytes(num_bytes)} of it for the last {window} tokens only"
        for window, num_bytes in in_windows.items()
    ]
    return ", ".join([every, *capped])


def _layer(kind: Mapping[str, Any]) -> str:
    attention, mlp = kind["attention"], kind["mlp"]
    heads, kv_heads, dim = attention["heads"], attention["kv_heads"], attention["head_dim"]
    if attention["latent"]:
        text = f"{heads} heads on one compressed vector of {dim} features"
    elif kv_heads == heads:
        text = f"{heads} heads of {dim} features"
    else:
        text = f"{heads} heads of {dim} features on {kv_heads} of keys and values"
    if attention["window_tokens"] is not None:
        text += f", over the last {attention['window_tokens']} tokens"
    shape = f"{'gated ' if mlp['gated'] else ''}{mlp['activation']}"
    if "experts" not in mlp:
        return f"{text}; MLP of {mlp['size']}, {shape}"
    shared = f", and one of {mlp['shared_size']} for all" if mlp["shared_size"] else ""
    return (
        f"{text}; {mlp['experts_per_token']} of {mlp['experts']} experts of {mlp['size']}, "
        f"{shape}{shared}"
    )


def _state(checkpoint: Mapping[str, Any]) -> str:
    if not checkpoint["complete"]:
        return f"can't be run: {checkpoint['reason']}"
    packing = checkpoint["packing"]
    packed = (
        f", matrices packed as {' and '.join(packing['forms'])}, "
        f"{packing['bits_per_weight']:g} bits a weight"
        if packing
        else ""
    )
    return (
        f"complete: {format_bytes(checkpoint['num_bytes'])}, {checkpoint['dtype'] or 'no'} numbers"
        f"{packed}"
    )

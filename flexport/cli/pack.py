"""`flexport pack`: compressed weights in the cache, made ahead of time, listed, checked, removed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime, timezone
from typing import Any

from flexport.checkpoint.packed import Entry, PackedCache
from flexport.cli.progress import show_packing
from flexport.cli.table import columns
from flexport.codecs.compressed import compressed
from flexport.engine.packing import known_entry, prepared
from flexport.engine.source import open_source
from flexport.engine.to_pack import left_as_they_are, plan_packing
from flexport.errors import CheckpointError, StorageError, UsageError
from flexport.policy import WEIGHT_CODECS
from flexport.units import format_bytes, format_count, format_seconds

__all__ = ["add_arguments", "run"]

_TO_PACK = ("model", "revision", "compress_weights", "overwrite", "dry_run")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    parser.epilog = (
        "Runs with --compress-weights find what was packed here, or pack it themselves. It lies in "
        "FLEXPORT_CACHE (an environment variable), or else in the user's cache directory."
    )
    packing = parser.add_argument_group("pack a model")
    packing.add_argument(
        "--model",
        metavar="DIR|HUB_ID",
        help="a Hugging Face directory, or a hub id such as facebook/opt-6.7b",
    )
    packing.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)"
    )
    packing.add_argument(
        "--compress-weights",
        choices=[codec for codec in WEIGHT_CODECS if codec != "none"],
        metavar="int8|int4[:GROUP]",
        help="a byte a weight; or half a byte, and a scale for each GROUP of 32, 64, 128 or 256 "
        "weights (default: 64)",
    )
    packing.add_argument(
        "--overwrite", action="store_true", help="pack it anew though it is in the cache"
    )
    packing.add_argument(
        "--dry-run", action="store_true", help="say what would be packed, and write nothing"
    )
    cache = parser.add_argument_group("what is in the cache").add_mutually_exclusive_group()
    cache.add_argument("--list", action="store_true", help="show all entries")
    cache.add_argument(
        "--remove", metavar="KEY|all", help="remove the entry whose key begins so, or all"
    )
    cache.add_argument(
        "--verify",
        nargs="?",
        const="all",
        metavar="KEY",
        help="read every byte of an entry, or of all, and compare it with what was written",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Do it; returns the exit code, which is 1 where --verify has found damage.

    stdout has what came of it, stderr how it goes.
    """
    given = [f"--{name.replace('_', '-')}" for name in _TO_PACK if getattr(args, name)]
    cache = PackedCache()
    if args.list or args.remove is not None or args.verify is not None:
        if given:
            raise UsageError(
                "--list, --remove and --verify are about what is in the cache, and can't be used "
                f"with {', '.join(given)}, which is about what to pack"
            )
        if args.list:
            return _list(cache, as_json=args.json)
        if args.remove is not None:
            return _remove(cache, args.remove, as_json=args.json)
        return _verify(cache, args.verify, as_json=args.json)
    if args.model is None or args.compress_weights is None:
        raise UsageError(
            "flexport pack takes a --model and --compress-weights int8 or int4, or one of --list, "
            "--remove and --verify"
        )
    return _pack(args, cache)


# ---- packing


def _pack(args: argparse.Namespace, cache: PackedCache) -> int:
    form = compressed(args.compress_weights)
    assert form is not None, args.compress_weights
    source = open_source(args.model, args.revision, "auto")
    assert source.files is not None, source.name
    packing = plan_packing(source, source.files, form)
    facts: dict[str, Any] = {
        "model": args.model,
        "codec": form.key,
        "weights": packing.num_values,
        "source_bytes": packing.source_bytes,
        "packed_bytes": packing.num_bytes,
        "bits_per_weight": packing.bits_per_weight,
        "files": len(packing.files),
        "left_as_they_are": [
            {"why": why, "tensors": number, "bytes": num_bytes}
            for why, (number, num_bytes) in left_as_they_are(source, form).items()
        ],
    }
    if args.dry_run:
        entry = known_entry(packing, cache)
        facts["key"] = None if entry is None else entry.key
        facts["directory"] = None if entry is None else str(entry.directory)
        facts["packed"] = entry is not None and entry.manifest() is not None
    else:
        started_s = time.monotonic()
        with (
            show_packing() as progress,
            prepared(source, packing, cache, progress, overwrite=args.overwrite) as packed,
        ):
            facts["seconds"] = time.monotonic() - started_s
        facts["key"] = packed.entry.key
        facts["directory"] = str(packed.entry.directory)
        facts["packed"] = True
        facts["packed_now_bytes"] = packed.packed_bytes
        facts["packing_seconds"] = packed.packing_s
    print(json.dumps(facts, indent=2) if args.json else _as_text(facts))
    return 0


def _as_text(facts: Mapping[str, Any]) -> str:
    rows = [
        ("key", facts["key"] or "not known before the checkpoint was read once"),
        ("directory", facts["directory"] or "-"),
        ("packed", _when(facts)),
        ("codec", facts["codec"]),
        ("weights", format_count(facts["weights"])),
        ("size", f"{format_bytes(facts['packed_bytes'])} in {facts['files']} files"),
        ("", f"{facts['bits_per_weight']:.2f} bits a weight"),
        ("", f"{format_bytes(facts['source_bytes'])} in the checkpoint"),
    ]
    for kind in facts["left_as_they_are"]:
        text = f"{kind['tensors']} tensors, {format_bytes(kind['bytes'])}: {kind['why']}"
        rows.append(("not packed", text))
    return "\n".join([facts["model"], *(f"  {line}" for line in columns(rows))])


def _when(facts: Mapping[str, Any]) -> str:
    if "seconds" not in facts:
        return "yes" if facts["packed"] else "no"
    took = format_seconds(facts["seconds"])
    if not facts["packed_now_bytes"]:
        return f"it was there already (looked at in {took})"
    rate = facts["packed_now_bytes"] / facts["packing_seconds"] / 1e6
    return f"now, in {took} ({rate:.0f} MB of the checkpoint a second)"


# ---- what is in the cache


def _list(cache: PackedCache, *, as_json: bool) -> int:
    found = [_facts(entry) for entry in cache.entries()]
    if as_json:
        print(json.dumps({"directory": str(cache.directory), "entries": found}, indent=2))
        return 0
    print(f"flexport: the cache is {cache.directory}", file=sys.stderr)
    rows = [("KEY", "MODEL", "CODEC", "COMPLETE", "LAST USED", "SIZE")]
    for each in found:
        used = "-" if each["last_used"] is None else each["last_used"][:16].replace("T", " ")
        state = "yes" if each["complete"] else each["problem"]
        rows.append(
            (each["key"], each["model"], each["codec"], state, used, format_bytes(each["bytes"]))
        )
    print("\n".join(columns(rows, num_words=5)))
    return 0


def _facts(entry: Entry) -> dict[str, Any]:
    """What --list shows of an entry, whatever state it is in."""
    problem: str | None = None
    manifest = None
    try:
        manifest = entry.manifest()
    except (CheckpointError, StorageError):
        problem = "no: its manifest can't be used"
    if manifest is None and problem is None:
        problem = "no: packing it was interrupted, or is under way"
    shown = manifest or entry.unfinished()
    return {
        "key": entry.key,
        "model": "?" if shown is None else shown.model,
        "revision": None if shown is None else shown.revision,
        "codec": "?" if shown is None else shown.codec,
        "bytes": entry.disk_bytes,
        "last_used": _time(entry.last_used_s),
        "complete": manifest is not None,
        "problem": problem,
    }


def _time(since_epoch_s: float | None) -> str | None:
    """In the zone that people here go by."""
    if since_epoch_s is None:
        return None
    utc = datetime.fromtimestamp(since_epoch_s, timezone.utc)
    return utc.astimezone().isoformat(timespec="seconds")


def _remove(cache: PackedCache, start: str, *, as_json: bool) -> int:
    removed: list[dict[str, Any]] = []
    refused: list[str] = []
    for entry in cache.entries() if start == "all" else [cache.find(start)]:
        num_bytes = entry.disk_bytes
        try:
            entry.remove()
        except UsageError as error:
            refused.append(str(error))
        else:
            removed.append({"key": entry.key, "bytes": num_bytes})
    if as_json:
        print(json.dumps({"removed": removed}, indent=2))
    else:
        for each in removed:
            print(f"{each['key']}  {format_bytes(each['bytes'])}")
    if refused:
        raise UsageError("\n".join(refused))
    return 0


def _verify(cache: PackedCache, start: str, *, as_json: bool) -> int:
    entries = cache.entries() if start == "all" else [cache.find(start)]
    results: list[dict[str, Any]] = []
    with show_packing() if entries else nullcontext() as progress:
        for entry in entries:
            state, reason = "whole", None
            try:
                manifest = entry.manifest()
                if manifest is None:
                    state = "unfinished"
                else:
                    assert progress is not None
                    what = f"reading {format_bytes(manifest.num_bytes)} in {entry.directory}"
                    progress.begin(what, manifest.num_bytes)
                    entry.check(manifest, (), progress.advance, read_all=True)
            except (CheckpointError, StorageError) as error:
                state, reason = "damaged", str(error)
            results.append({"key": entry.key, "state": state, "reason": reason})
    for each in results:
        if each["reason"] is not None:
            print(f"flexport: {each['key']}: {each['reason']}", file=sys.stderr)
    if as_json:
        print(json.dumps({"entries": results}, indent=2))
    else:
        _print_states(results)
    return 1 if any(each["state"] == "damaged" for each in results) else 0


def _print_states(results: Sequence[Mapping[str, Any]]) -> None:
    for each in results:
        print(f"{each['key']}  {each['state']}")

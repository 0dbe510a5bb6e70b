"""flexport beside its peers on the same weights, prompts and machine: `python -m flexport.bench.versus`.

Three cases. In memory: all weights fit, and the question is how well the cores are used. Capped:
every contestant runs under the same real memory cap, which the weights exceed, and the question
is how well the disk and the cores are used together. Card, for a device with memory of its own:
the weights exceed that memory, and the question is how well its link is used. First the machine's ceilings are measured,
so that a speed has something to be judged by besides other programs.

stdout gets one JSON line for each contestant and batch size and a last one with the ratios;
stderr says how it goes, and ends with a table. A full run on OPT-1.3b shapes takes about 20
minutes on two cores and 3 GB of disk in --dir, which are used again next time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexport.bench.cage import CagedRun, drop_cached, run_caged
from flexport.bench.ceilings import ceilings_for
from flexport.bench.checkpoint import WEIGHTS_NAME, shapes_of, shared_checkpoint
from flexport.bench.peers import PEERS, Peer
from flexport.errors import FlexportError, UsageError
from flexport.models import spec_of
from flexport.registry import open_backend
from flexport.units import format_bytes, parse_bytes

__all__ = ["main"]

CASES = ("memory", "capped", "card")

_DEFAULT_CASES = CASES[:2]
"""What every machine can run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setting:
    """What all contestants have in common."""

    args: argparse.Namespace
    checkpoint: Path
    ceilings_file: Path

    @property
    def weights(self) -> Path:
        """The file that all of them read."""
        return self.checkpoint / WEIGHTS_NAME

    def cap_bytes(self, case: str) -> int | None:
        """The memory cap of a case."""
        return self.args.memory_cap if case == "capped" else None


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        lines = _run(args)
    except FlexportError as error:
        _say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1
    _say("\n" + _table(lines))
    return 0 if all(line["ok"] for line in lines if line["contestant"] == "flexport") else 1


def _run(args: argparse.Namespace) -> list[dict[str, Any]]:
    if "card" in args.case:
        _refuse_shared_memory(args.backend)
    checkpoint = shared_checkpoint(args.model, args.dtype, args.dir, _say)
    ceilings = ceilings_for(
        spec_of(shapes_of(args.model)), args.dtype, args.backend, args.dir, _say
    )
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=args.dir, prefix="versus-") as scratch:
        ceilings_file = Path(scratch) / "ceilings.json"
        ceilings_file.write_text(json.dumps(ceilings.to_dict()), encoding="utf-8")
        setting = _Setting(args=args, checkpoint=checkpoint, ceilings_file=ceilings_file)
        _emit({"contestant": "ceilings", **ceilings.to_dict()})
        for case in args.case:
            lines.append(_emit(_flexport(setting, case)))
            for peer in PEERS:
                if peer.case == case and not args.no_peers:
                    for line in _peer(setting, case, peer):
                        lines.append(_emit(line))
    _emit({"contestant": "summary", **_summary(lines)})
    return lines


def _refuse_shared_memory(backend: str) -> None:
    """Before gigabytes are written for nothing. Raises UsageError."""
    _, opened = open_backend(backend)
    shared = opened.capabilities.unified
    opened.close()
    if shared:
        raise UsageError(
            f"--case card compares on a device with memory of its own, and {backend!r} uses the "
            "host's; name another with --backend (`flexport backends` lists them)"
        )


# ---- contestants


def _flexport(setting: _Setting, case: str) -> dict[str, Any]:
    args = setting.args
    num_prompts, repeats, more = {
        "memory": (args.num_prompts, args.repeats, shlex.split(args.memory_options)),
        "capped": (args.capped_prompts, args.capped_repeats, shlex.split(args.capped_options)),
        "card": (
            args.card_prompts,
            args.card_repeats,
            ["--device-memory", str(args.card_memory), *shlex.split(args.card_options)],
        ),
    }[case]
    command = [
        sys.executable, "-m", "flexport", "bench", "--json",
        "--model", str(setting.checkpoint),
        "--backend", args.backend,
        "--dtype", args.dtype,
        "--prompt-len", str(args.prompt_len),
        "--gen-len", str(args.gen_len),
        "--num-prompts", str(num_prompts),
        "--repeats", str(repeats),
        "--seed", str(args.seed),
        "--ceilings", str(setting.ceilings_file),
        "--offload-dir", str(args.dir),
        *more,
    ]  # fmt: skip
    line = {"contestant": "flexport", "case": case, **_measured(setting, case, command)}
    if line["ok"] and line["cage"]["anonymous_peak_bytes"]:
        # The constant that a run takes beyond what it counts: the interpreter and its libraries.
        counted = line["peak_bytes"]["host" if case == "card" else "device"]
        line["beyond_budget_bytes"] = line["cage"]["anonymous_peak_bytes"] - counted
    return line


def _peer(setting: _Setting, case: str, peer: Peer) -> list[dict[str, Any]]:
    """A line for each batch size."""
    head: dict[str, Any] = {"contestant": peer.name, "case": case}
    missing = [name for name in peer.packages if importlib.util.find_spec(name) is None]
    if missing:
        return [{**head, "ok": False, "error": f"not installed: {', '.join(missing)}"}]
    args = setting.args
    lines = []
    for batch_size in args.peer_batch_sizes or peer.batch_sizes:
        command = [
            sys.executable, "-m", peer.module,
            "--model", str(setting.checkpoint),
            "--scratch", str(setting.ceilings_file.parent),
            "--batch-size", str(batch_size),
            "--num-prompts", str(batch_size * args.peer_batches),
            "--prompt-len", str(args.prompt_len),
            "--gen-len", str(args.gen_len),
            "--seed", str(args.seed),
            *([] if case == "capped" else ["--warm-up"]),
            *(["--device-memory", str(args.card_memory)] if case == "card" else []),
        ]  # fmt: skip
        own = {**head, "batch_size": batch_size}
        lines.append({**own, **_measured(setting, case, command)})
    return lines


def _measured(setting: _Setting, case: str, command: Sequence[str]) -> dict[str, Any]:
    """What the command's JSON line says, and what its cage says."""
    cap_bytes = setting.cap_bytes(case)
    cap = f" under {format_bytes(cap_bytes)}" if cap_bytes else ""
    _say(f"running{cap}: {shlex.join(command[1:])}")
    if cap_bytes is not None:
        drop_cached(setting.weights)
    ran = run_caged(command, cap_bytes, setting.args.timeout)
    cage = asdict(ran)
    output = cage.pop("output")
    found: dict[str, Any] = {"ok": False}
    if ran.exit_code == 0:
        found = {**json.loads(output.splitlines()[-1]), "ok": True}
    else:
        found["error"] = _failure(ran, setting.args.timeout)
    return {**found, "cap_bytes": cap_bytes, "cage": cage}


def _failure(ran: CagedRun, timeout_s: float) -> str:
    if ran.exit_code in (-9, 137):
        late = ran.seconds >= timeout_s
        return f"stopped after {timeout_s:.0f} s" if late else "killed, out of memory"
    return f"exit code {ran.exit_code}; see its stderr"


# ---- results


def _summary(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each case's best peer, and flexport's speed as a multiple of it."""
    summary: dict[str, Any] = {}
    for case in CASES:
        own = [line for line in lines if line["case"] == case and line["contestant"] == "flexport"]
        peers = [line for line in lines if line["case"] == case and line not in own]
        ran = [line for line in peers if line["ok"]]
        if not own or not own[0]["ok"]:
            continue
        found = {"tok_s": own[0]["tok_s"], "share_of_limit": own[0]["limit"]["share"]}
        if ran:
            best = max(ran, key=lambda line: line["tok_s"])
            found.update(
                best_peer=best["contestant"],
                best_peer_batch_size=best["batch_size"],
                best_peer_tok_s=best["tok_s"],
                ratio=own[0]["tok_s"] / best["tok_s"],
            )
        summary[case] = found
    return summary


def _table(lines: Sequence[dict[str, Any]]) -> str:
    rows = [("case", "contestant", "rows", "tok/s", "limit", "peak in cage", "peak anonymous")]
    for line in lines:
        cage = line.get("cage")
        rows.append(
            (
                line["case"],
                line["contestant"],
                str(line.get("batch_size", "auto")),
                f"{line['tok_s']:.2f}" if line["ok"] else line["error"],
                f"{line['limit']['share']:.2f}" if "limit" in line else "",
                format_bytes(cage["cage_peak_bytes"]) if cage and cage["cage_peak_bytes"] else "",
                format_bytes(cage["anonymous_peak_bytes"]) if cage else "",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for case, found in _summary(lines).items():
        if "ratio" in found:
            table.append(f"{case}: {found['ratio']:.2f} times {found['best_peer']}")
    enforced = {line["cage"]["enforced_by"] for line in lines if line.get("cap_bytes")}
    table += [f"the cap was held by {by}" for by in sorted(enforced)]
    return "\n".join(table)


def _emit(line: dict[str, Any]) -> dict[str, Any]:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return line


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


# ---- options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flexport.bench.versus",
        description="Compare flexport with its peers on the same weights, prompts and machine.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dir", type=Path, required=True, help="where weights and temporary files go")
    add("--model", default="facebook/opt-1.3b", help="whose shapes the random weights have")
    add("--backend", default="cpu", help="what flexport runs on")
    add("--dtype", default="bfloat16", help="of the weights, and computed in")
    add("--case", nargs="+", choices=CASES, default=_DEFAULT_CASES, help="what is compared")
    add("--memory-cap", type=parse_bytes, default="1.5GB", help="of the capped case")
    add("--prompt-len", type=int, default=128, help="tokens of each prompt")
    add("--gen-len", type=int, default=32, help="tokens generated for each prompt")
    add("--seed", type=int, default=0, help="of the prompts")
    add("--num-prompts", type=int, default=64, help="flexport's prompts in memory")
    add("--repeats", type=int, default=3, help="flexport's runs in memory")
    add("--capped-prompts", type=int, default=512, help="flexport's prompts under the cap")
    add("--capped-repeats", type=int, default=1, help="flexport's runs under the cap")
    add("--memory-options", default="", help="more options of flexport bench, in memory")
    add("--capped-options", default="", help="more options of flexport bench, under the cap")
    add("--card-memory", type=parse_bytes, default="16GiB", help="of the card in its case")
    add("--card-prompts", type=int, default=128, help="flexport's prompts on the card")
    add("--card-repeats", type=int, default=1, help="flexport's runs on the card")
    add("--card-options", default="", help="more options of flexport bench, on the card")
    add("--no-peers", action="store_true", help="run flexport alone")
    add("--peer-batches", type=int, default=1, help="batches of each peer run")
    add(
        "--peer-batch-sizes",
        type=int,
        nargs="+",
        help="rows of a peer's batch, each tried (default: a list for each peer)",
    )
    add("--timeout", type=float, default=1200, help="seconds for each run")
    return parser


def _stop(*_: object) -> None:
    """Leave by the ordinary way, on which the contestant under way is stopped and files go."""
    sys.exit(143)  # 128 + SIGTERM, as shells report it


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())

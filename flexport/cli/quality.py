"""`flexport quality`: what packing weights and KV cache does to a model's answers, on any text."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flexport
from flexport import demo
from flexport.apps.demo import documents
from flexport.apps.quality import (
    EXACT,
    Codecs,
    Compared,
    Pair,
    compare,
    cut,
    text_prefix,
    windows,
)
from flexport.cli.engine_options import add_engine_arguments, engine_settings, positive
from flexport.cli.progress import say, show_packing, show_progress
from flexport.errors import StorageError, UsageError

if TYPE_CHECKING:
    from flexport.engine.llm import LLM

__all__ = ["add_arguments", "run"]

_STANDARD = "-"
_WINDOW = 512
"""Tokens: enough for a cache to be packed and looked back at, few enough for many rows at once."""

_DEFAULT_CODECS = ("none,none", "int8,none", "int4,none", "none,int8", "none,int4", "int4,int4")

_log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare this subcommand's options."""
    work = parser.add_argument_group("work")
    work.add_argument(
        "--codecs",
        nargs="+",
        type=_codecs,
        metavar="WEIGHTS,CACHE",
        help="what weights and KV cache are packed as, pair by pair, in the words of "
        "--compress-weights and --compress-cache; none,none, which all are compared with, comes first "
        f"in any case (default: {' '.join(_DEFAULT_CODECS)}; with --attn-sparsity, none,none). With "
        "--attn-sparsity each pair is measured so, and compared with none,none without it",
    )
    work.add_argument(
        "--text",
        metavar="FILE|-",
        help="what is scored, as UTF-8; - is stdin (default: the embedded demo's records and their "
        "answers, for the embedded model)",
    )
    work.add_argument(
        "--window",
        type=positive,
        metavar="TOKENS",
        help="tokens that are computed together: those scored, and those before them "
        f"(default: {_WINDOW}, or what the model has positions for)",
    )
    work.add_argument(
        "--stride",
        type=positive,
        metavar="TOKENS",
        help="of a window, the last tokens, which are scored one by one; the next window begins so "
        "many later (default: half the window)",
    )
    work.add_argument(
        "--max-tokens",
        type=positive,
        metavar="TOKENS",
        help="score the first so many tokens only (default: all)",
    )
    parser.add_argument_group("result").add_argument(
        "--json",
        metavar="FILE|-",
        help="write all numbers there, as JSON; - is stdout, in place of the table",
    )
    add_engine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure, and print the result on stdout; returns the exit code."""
    settings, attn_sparsity = _without_sparsity(_settings(args))
    codecs = _asked(args, attn_sparsity)
    is_demo = args.model is None or Path(args.model) == demo.MODEL_DIR
    text = _text(args, is_demo)
    with _open_llm(settings, EXACT) as llm:
        pairs, how = _pairs(llm, text, args)
    num_rows = len(pairs) + (len(demo.expected()) if is_demo else 0)
    found: list[Compared] = []
    with show_progress(len({EXACT, *codecs}) * num_rows) as progress:
        for each in compare(
            partial(_open_llm, settings), codecs, pairs, progress, with_demo=is_demo
        ):
            found.append(each)
            say(f"flexport: {each.measured.codecs}: perplexity {each.figures.perplexity:.4f}")
    _show(args, _result(found, how))
    return 0


# ---- what is asked for


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Of the engine, codecs left out. Raises UsageError for what can be known to be wrong."""
    if args.json not in (None, _STANDARD) and not Path(args.json).parent.is_dir():
        raise UsageError(f"--json {args.json}: there is no folder {Path(args.json).parent}")
    settings = engine_settings(args)
    if args.trace is not None:
        raise UsageError("--trace shows one run, and this is one for each pair; use `flexport run`")
    policy = settings["policy"].to_dict() if "policy" in settings else {}
    for name in Codecs(weights="int4", cache="int4").settings():
        if {**policy, **settings}.get(name, "none") != "none":
            raise UsageError(f"{name} is given, and `flexport quality` takes codecs from --codecs")
    return settings


def _without_sparsity(settings: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Settings for what is exact, and the share of values that was asked for."""
    own, attn_sparsity = dict(settings), settings.get("attn_sparsity", 1.0)
    own.pop("attn_sparsity", None)
    if "policy" in own:
        attn_sparsity = own["policy"].attn_sparsity
        own["policy"] = replace(own["policy"], attn_sparsity=1.0)
    return own, attn_sparsity


def _asked(args: argparse.Namespace, attn_sparsity: float) -> list[Codecs]:
    """What is measured beside what is exact."""
    default = [EXACT] if attn_sparsity < 1 else [Codecs.parse(pair) for pair in _DEFAULT_CODECS]
    return [replace(each, attn_sparsity=attn_sparsity) for each in args.codecs or default]


def _open_llm(settings: Mapping[str, Any], codecs: Codecs) -> LLM:
    """The engine with these codecs. A policy, which says all, is changed to have them."""
    own = {**settings, **codecs.settings()}
    if "policy" in settings:
        own = {**settings, "policy": replace(settings["policy"], **codecs.settings())}

    from flexport.engine.llm import LLM  # and torch, after what can be refused without it

    return LLM(
        **own,
        on_plan=lambda plan: _log.info("%s", plan.describe()),
        show_packing=show_packing,
    )


def _text(args: argparse.Namespace, is_demo: bool) -> str | None:
    """The text to score; None is the demo's records."""
    if args.text is None:
        if not is_demo:
            raise UsageError(
                f"--model {args.model} has no text to score; add --text FILE (what is embedded is "
                "for the embedded model)"
            )
        return None
    try:
        raw = sys.stdin.buffer.read() if args.text == _STANDARD else Path(args.text).read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"can't read --text {args.text}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {args.text} is not UTF-8: {error}") from error
    if not text.strip():
        raise UsageError(f"--text {args.text} is empty; there is nothing to score")
    return text


def _pairs(
    llm: LLM, text: str | None, args: argparse.Namespace
) -> tuple[list[Pair], dict[str, Any]]:
    """What to score after what, and how the text was cut into it."""
    if llm.tokenizer is None:
        raise UsageError(f"{llm.model_name} came without a tokenizer, so no text can be scored")
    window = args.window or min(_WINDOW, llm.max_positions)
    if window > llm.max_positions:
        raise UsageError(
            f"--window {window} is longer than the {llm.max_positions} positions of "
            f"{llm.model_name}"
        )
    stride = args.stride or max(1, window // 2)
    texts = documents(llm.tokenizer) if text is None else [llm.tokenizer.encode_continuation(text)]
    prefix = text_prefix(llm.tokenizer)
    pairs = [
        pair for ids in texts for pair in windows(ids, prefix=prefix, window=window, stride=stride)
    ]
    if args.max_tokens is not None:
        pairs = cut(pairs, args.max_tokens)
    if not pairs:
        raise UsageError("the text is a single token, and there is none to predict it from")
    return pairs, {
        "text": "the demo's records and answers" if text is None else args.text,
        "num_tokens": sum(len(target) for _, target in pairs),
        "num_windows": len(pairs),
        "window_tokens": window,
        "stride_tokens": stride,
    }


# ---- what came out


def _line(found: Compared) -> dict[str, Any]:
    own, marks = found.measured, found.demo
    return {
        "weights": own.codecs.weights,
        "cache": own.codecs.cache,
        "attn_sparsity": own.codecs.attn_sparsity,
        "weight_bits": own.weight_bits,
        "cache_bits": own.cache_bits,
        **asdict(found.figures),
        "tok_s": own.tok_s,
        "seconds": own.report["seconds"],
        "moved_bytes": own.report["moved_bytes"],
        "sparse_attention": own.report.get("sparse_attention", {}),
        "peak_bytes": own.report["peak_bytes"],
        "policy": own.report["policy"],
        "placement": own.report["placement"],
        "compression": own.report.get("compression"),
        **({} if marks is None else {"demo": asdict(marks)}),
    }


def _result(found: Sequence[Compared], how: Mapping[str, Any]) -> dict[str, Any]:
    from flexport.bench.job import commit

    report = found[0].measured.report
    return {
        **how,
        **{name: report[name] for name in ("model", "backend", "dtype", "machine")},
        "version": flexport.__version__,
        "commit": commit(),
        "codecs": [_line(each) for each in found],
    }


def _show(args: argparse.Namespace, result: Mapping[str, Any]) -> None:
    if args.json == _STANDARD:
        print(json.dumps(result, indent=2))
        return
    print(_table(result))
    if args.json is not None:
        try:
            Path(args.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise StorageError(f"can't write {args.json}: {error.strerror}") from error


def _table(result: Mapping[str, Any]) -> str:
    """The result for a person to read: a line for each pair of codecs."""
    header = [
        "weights", "cache", "values", "bits/weight", "bits/KV value", "perplexity", "ratio to exact",
        "same token", "right token", "tok/s",
    ]  # fmt: skip
    has_demo = "demo" in result["codecs"][0]
    rows = [[*header, *(["demo exact"] if has_demo else [])]]
    for line in result["codecs"]:
        marks = [f"{line['demo']['num_exact']}/{line['demo']['num_rows']}"] if has_demo else []
        rows.append(
            [
                line["weights"],
                line["cache"],
                f"{line['attn_sparsity']:.3g}",
                f"{line['weight_bits']:.2f}",
                f"{line['cache_bits']:.2f}",
                f"{line['perplexity']:.4f}",
                f"{line['ratio']:.4f} ± {line['ratio_error']:.4f}",
                f"{line['same_token']:.2%}",
                f"{line['right_token']:.2%}",
                f"{line['tok_s']:.1f}",
                *marks,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    about = (
        f"{result['model']} on {result['backend']} in {result['dtype']}: {result['num_tokens']} "
        f"tokens scored, in windows of {result['window_tokens']} that score "
        f"{result['stride_tokens']} each"
    )
    return "\n".join([about, *lines])


def _codecs(text: str) -> Codecs:
    try:
        return Codecs.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error

"""The options that every command with a model shares, and what they ask of the engine.

Options have the names of `flexport.LLM`'s arguments. One that is not given is not passed on, so
defaults are stated once, there. What can be checked without torch (sizes, the policy file,
options that contradict each other) is checked here, before anything heavy is imported.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flexport.errors import UsageError
from flexport.policy import CACHE_CODECS, WEIGHT_CODECS, Policy
from flexport.units import parse_bytes

__all__ = ["POLICY_OPTIONS", "add_engine_arguments", "engine_settings", "positive"]

_SHARES = ("WD", "WH", "KD", "KH", "AD", "AH")

_BLOCK_OPTIONS = ("batch_size", "num_batches", "prefill_tokens", "sweep_tokens")
POLICY_OPTIONS = (
    "percent",
    *_BLOCK_OPTIONS,
    "cpu_attention",
    "compress_weights",
    "compress_cache",
    "max_latency",
    "attn_sparsity",
)
"""What `flexport.engine.llm.policy_asked` takes beside a policy."""

_SETTINGS = (
    "model",
    "revision",
    "load_format",
    "backend",
    "dtype",
    *POLICY_OPTIONS,
    "device_memory",
    "host_memory",
    "disk_memory",
    "offload_dir",
    "trace",
)
"""Options that go to `flexport.LLM` as they are."""


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shared options, in groups."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        metavar="DIR|HUB_ID",
        help="a Hugging Face directory, or a hub id such as facebook/opt-6.7b "
        "(default: the embedded demo model)",
    )
    model.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)"
    )
    model.add_argument(
        "--load-format",
        choices=("auto", "dummy"),
        help="auto: read the checkpoint; dummy: seeded random weights of the right shapes, which "
        "needs no checkpoint, and no network for a known hub id (default: auto)",
    )
    model.add_argument(
        "--backend",
        metavar="auto|NAME|NAME:INDEX",
        help="the device to run on, as `flexport backends` lists them, NAME:1 for the second one "
        "of several (default: auto, the best usable one)",
    )
    model.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="what is computed in (default: auto, what the backend says suits the device; the "
        "run prints which and why)",
    )

    plan = parser.add_argument_group("policy: what lives where, and how many rows run at once")
    plan.add_argument(
        "--policy",
        metavar="auto|FILE",
        default="auto",
        help="auto: the shares and the block that are predicted to be fastest within the budgets; "
        "FILE: a policy as JSON, which then says all of this group (default: auto)",
    )
    plan.add_argument(
        "--percent",
        nargs=6,
        type=float,
        metavar=_SHARES,
        help="per cent of the weights on device and on host, of the KV cache on device and on "
        "host, of the activations on device and on host; the rest of each is on disk "
        "(default: the policy's)",
    )
    plan.add_argument(
        "--batch-size",
        type=positive,
        metavar="ROWS",
        help="rows of a micro-batch (default: the policy's)",
    )
    plan.add_argument(
        "--num-batches",
        type=positive,
        metavar="N",
        help="micro-batches that share each sweep over the weights (default: the policy's)",
    )
    plan.add_argument(
        "--prefill-tokens",
        type=positive,
        metavar="TOKENS",
        help="most tokens in one visit of a layer; longer micro-batches are prefilled in "
        "pieces (default: the policy's)",
    )
    plan.add_argument(
        "--sweep-tokens",
        type=_natural,
        metavar="TOKENS",
        help="prompt tokens that one sweep over the layers carries at most, so that new rows join "
        "while others decode; 0 = no bound (default: the policy's)",
    )
    plan.add_argument(
        "--cpu-attention",
        choices=("auto", "on", "off"),
        help="attend on the CPU over the cache that is not on the device, so that queries and "
        "results cross the link in its place; auto: where that is predicted to be faster "
        "(default: auto)",
    )
    plan.add_argument(
        "--compress-weights",
        choices=(*WEIGHT_CODECS, "auto"),
        metavar="none|int8|int4|int4:GROUP|auto",
        help="pack the matrices of the decoder layers, where they rest and where they travel, in 8 "
        "bits (a scale a row) or in 4 (a scale and a zero for each 64 features, or GROUP: 32, 64, "
        "128, 256); made once and kept, see `flexport pack`; auto: none, int8 or int4, whichever is "
        "predicted to be fastest (default: none)",
    )

    plan.add_argument(
        "--compress-cache",
        choices=(*CACHE_CODECS, "auto"),
        help="what the KV cache is kept in, but for the newest tokens: 8 or 4 bits a value, scales on "
        "top, or none, the dtype computed in. It changes the answers a little; needs prompts that "
        "no --sweep-tokens share out; auto: whichever is predicted to be fastest (default: none)",
    )
    plan.add_argument(
        "--max-latency",
        type=_seconds,
        metavar="SECONDS",
        help="the most that may be predicted for a block, from the beginning of its first prompt to "
        "its last token (of a micro-batch, where rows come and go all the time); loading the model "
        "is not in it (default: no bound, the most tokens a second)",
    )
    plan.add_argument(
        "--attn-sparsity",
        type=_share,
        metavar="SHARE",
        help="share of the tokens whose values a decode step adds up, those of the largest attention "
        "weights; the other values stay where the cache lives. 0.1 is a tenth. It changes the "
        "answers (default: 1, all of them)",
    )

    budgets = parser.add_argument_group(
        "budgets: hard caps; SIZE is e.g. 14GiB, 1.5GB or 800MiB (default: what is free, less a "
        "margin)"
    )
    for tier, what in (
        ("device", "device memory, staging included"),
        ("host", "host memory, staging and pinned buffers included"),
        ("disk", "disk space for spilled tensors; weights read in place cost none"),
    ):
        budgets.add_argument(f"--{tier}-memory", type=_size, metavar="SIZE", help=f"most {what}")
    budgets.add_argument(
        "--offload-dir",
        metavar="DIR",
        help="where spilled tensors live, in a folder that is removed at the end (default: the "
        "system's temporary directory)",
    )
    parser.add_argument_group("looking closer").add_argument(
        "--trace",
        metavar="FILE",
        help="write what every lane does when (reads, copies, computing, waiting, with layer and "
        "batch) there, in the Chrome trace format; https://ui.perfetto.dev opens it",
    )


def engine_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `flexport.LLM` that these options ask for.

    Raises UsageError for options that contradict each other, and for a policy file that can't be
    used.
    """
    settings = {name: getattr(args, name) for name in _SETTINGS if getattr(args, name) is not None}
    if args.revision is not None and (args.model is None or Path(args.model).is_dir()):
        raise UsageError(
            f"--revision {args.revision} names a version of a hub id, and the model is "
            f"{'the embedded demo' if args.model is None else 'the directory ' + args.model}; "
            "leave --revision out, or give --model a hub id"
        )
    if args.policy == "auto":
        return settings
    also_given = [name for name in POLICY_OPTIONS if name in settings]
    if settings.get("cpu_attention") == "auto":
        also_given.remove("cpu_attention")
    if also_given:
        options = ", ".join("--" + name.replace("_", "-") for name in also_given)
        raise UsageError(
            f"--policy {args.policy} and {options} both say the policy; edit the file, or leave "
            "one of them out"
        )
    return {**settings, "policy": Policy.from_file(args.policy)}


def positive(text: str) -> int:
    """An argument's type: a whole number >= 1."""
    return _whole(text, 1)


def _size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds > 0")
    return number


def _whole(text: str, least: int) -> int:
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number >= {least}")
    return number


def _natural(text: str) -> int:
    return _whole(text, 0)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return share

"""What the transformers peers have in common: arguments in, one timed generation, a JSON line out.

Prompts are of one length, so nothing is padded; sampling is greedy and no row ends early. One
short generation before the clock starts takes what a first call costs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flexport.bench.workload import Workload

__all__ = ["peer_main"]

Load = Callable[[Path, Path, int | None], Any]
"""load(model directory, scratch directory, bytes of device memory) -> a transformers model."""


def peer_main(load: Load) -> int:
    """Run one peer on its command line's work; returns the exit code."""
    args = _arguments()
    work = Workload(
        num_prompts=args.num_prompts,
        prompt_len=args.prompt_len,
        gen_len=args.gen_len,
        seed=args.seed,
    )
    started_s = time.perf_counter()
    model = load(Path(args.model), Path(args.scratch), args.device_memory)
    model.eval()
    # Random weights may make the end-of-text token likely; no row may end early.
    model.generation_config.eos_token_id = None
    load_s = time.perf_counter() - started_s
    prompts = work.prompts(model.config.vocab_size)
    if args.warm_up:
        _generate(model, prompts[: args.batch_size], min(2, work.gen_len))
    seconds = 0.0
    for begin in range(0, len(prompts), args.batch_size):
        batch = prompts[begin : begin + args.batch_size]
        batch_s = _generate(model, batch, work.gen_len)
        seconds += batch_s
        rate = len(batch) * work.gen_len / batch_s
        print(f"    batch of {len(batch)}: {batch_s:.1f} s, {rate:.2f} tok/s", file=sys.stderr)  # noqa: T201 - a script
    found = {
        "seconds": {"load": load_s, "prefill_and_decode": seconds},
        "tok_s": work.num_new_tokens / seconds,
        "versions": _versions(),
    }
    print(json.dumps(found))  # noqa: T201 - its result
    return 0


def _generate(model: Any, prompts: list[list[int]], num_new: int) -> float:
    """Seconds of continuing all prompts by num_new tokens."""
    import torch

    # Weights that are offloaded are on "meta" until it is their turn.
    device = model.device if model.device.type != "meta" else torch.device("cpu")
    ids_NL = torch.tensor(prompts, device=device)
    started_s = time.perf_counter()
    with torch.inference_mode():
        out_NM = model.generate(
            input_ids=ids_NL,
            attention_mask=torch.ones_like(ids_NL),
            do_sample=False,
            min_new_tokens=num_new,
            max_new_tokens=num_new,
        ).cpu()  # which waits for the device
    seconds = time.perf_counter() - started_s
    assert out_NM.shape[1] == ids_NL.shape[1] + num_new, (out_NM.shape, num_new)
    return seconds


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "safetensors", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--scratch", required=True)
    parser.add_argument("--device-memory", type=int)
    parser.add_argument("--warm-up", action="store_true")
    for name in ("batch-size", "num-prompts", "prompt-len", "gen-len", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    return parser.parse_args()

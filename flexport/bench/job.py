"""One benchmark of the engine: the same work several times, and what it reached.

Loading is not counted, prefill and decode are. The result is plain data, ready to be a JSON line:
what is needed to get the numbers again stands beside them.
"""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flexport
from flexport.bench.ceilings import Ceilings
from flexport.bench.limit import limit_of, work_flops
from flexport.bench.spread import Spread
from flexport.bench.workload import Workload
from flexport.models.spec import ModelSpec
from flexport.records import Request, SamplingParams

if TYPE_CHECKING:
    from flexport.engine.llm import LLM

__all__ = ["commit", "middle", "process_peak_bytes", "result", "run_repeats", "table"]


def run_repeats(
    llm: LLM, work: Workload, repeats: int, say: Callable[[str], None] = lambda _: None
) -> list[dict[str, Any]]:
    """Run the work `repeats` times on one engine; the reports, in order."""
    sampling = SamplingParams(max_tokens=work.gen_len, ignore_eos=True)
    requests = [
        Request(request_id=str(index), token_ids=tuple(ids), sampling=sampling)
        for index, ids in enumerate(work.prompts(llm.vocab_size))
    ]
    reports: list[dict[str, Any]] = []
    for repeat in range(repeats):
        num_tokens = 0
        for completion in llm.engine.generate(requests):
            num_tokens += len(completion.token_ids)
        assert num_tokens == work.num_new_tokens, (num_tokens, work)
        report = llm.report
        reports.append(report)
        rate, seconds = report["throughput"]["generation_tok_s"], report["seconds"]
        say(
            f"run {repeat + 1} of {repeats}: {rate:.1f} tok/s "
            f"(prefill {seconds['prefill']:.1f} s, decode {seconds['decode']:.1f} s)"
        )
    return reports


def middle(reports: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the run whose rate is the median, or the next above it."""
    return sorted(reports, key=_tok_s)[len(reports) // 2]


def _tok_s(report: Mapping[str, Any]) -> float:
    return float(report["throughput"]["generation_tok_s"])


def result(
    reports: Sequence[Mapping[str, Any]],
    work: Workload,
    spec: ModelSpec,
    *,
    device: str,
    peak_bytes: int | None,
    ceilings: Ceilings | None,
) -> dict[str, Any]:
    """One JSON line of a benchmark. `peak_bytes` is the process's, `ceilings` may be unknown."""
    rates = [_tok_s(report) for report in reports]
    report = middle(reports)
    busy_s = report["seconds"]["prefill"] + report["seconds"]["decode"]
    rate = Spread.of(rates)
    found: dict[str, Any] = {
        "contestant": "flexport",
        "version": flexport.__version__,
        "commit": commit(),
        "machine": {**report["machine"], "device": device, "python": platform.python_version()},
        "model": report["model"],
        "backend": report["backend"],
        "dtype": report["dtype"],
        "policy": report["policy"],
        "num_prompts": work.num_prompts,
        "prompt_len": work.prompt_len,
        "gen_len": work.gen_len,
        "repeats": len(reports),
        "tok_s": rate.median,
        "spread": rate.spread,
        "tok_s_each": list(rate.values),
        "budgets": report["plan"]["budgets"],
        "seconds": report["seconds"],
        "busy_seconds": report["busy_seconds"],
        "wait_seconds": report["wait_seconds"],
        "moved_bytes": report["moved_bytes"],
        "peak_bytes": {**report["peak_bytes"], "process": peak_bytes},
        "flops": work_flops(spec, work),
        "comparison": report["comparison"],
        "warnings": report["warnings"],
    }
    if ceilings is not None:
        streamed_bytes = sum(report["moved_bytes"][lane] for lane in _DISK_LANES)
        limit = limit_of(
            disk_bytes=streamed_bytes,
            flops=found["flops"],
            disk_bytes_per_s=ceilings.disk_bytes_per_s,
            flops_per_s=ceilings.flops_per_s,
        )
        found["ceilings"] = ceilings.to_dict()
        found["limit"] = {
            "disk_s": limit.disk_s,
            "compute_s": limit.compute_s,
            "limit_s": limit.limit_s,
            "limited_by": limit.limited_by,
            "share": limit.share(busy_s),
        }
    return found


def table(found: Mapping[str, Any]) -> str:
    """The result for a person to read."""
    seconds, moved = found["seconds"], found["moved_bytes"]
    lengths = f"{found['prompt_len']} tokens, {found['gen_len']} new ones each"
    work = f"{found['num_prompts']} prompts of {lengths}"
    rows = [
        ("model", f"{found['model']} on {found['backend']} in {found['dtype']}"),
        ("work", work),
        ("throughput", f"{found['tok_s']:.1f} tok/s in prefill and decode"),
        ("repeats", f"{found['repeats']}, spread {100 * found['spread']:.1f} %"),
        ("prefill, decode", f"{seconds['prefill']:.1f} s, {seconds['decode']:.1f} s"),
        ("load", f"{seconds['load']:.1f} s"),
        (
            "from and to disk",
            f"{_gigabytes(moved['disk_to_host'])}, {_gigabytes(moved['host_to_disk'])}",
        ),
        ("peak in budget", _gigabytes(found["peak_bytes"]["device"])),
    ]
    if found["peak_bytes"]["process"] is not None:
        rows.append(("peak of process", _gigabytes(found["peak_bytes"]["process"])))
    if "limit" in found:
        limit, ceilings = found["limit"], found["ceilings"]
        sides = f"disk {limit['disk_s']:.1f} s, compute {limit['compute_s']:.1f} s"
        rows += [
            ("disk ceiling", f"{_gigabytes(ceilings['disk_bytes_per_s'])}/s"),
            ("matrix ceiling", f"{ceilings['flops_per_s'] / 1e9:.0f} GFLOP/s"),
            ("limit", f"{limit['limit_s']:.1f} s, set by {limit['limited_by']} ({sides})"),
            ("share of the limit", f"{limit['share']:.2f}"),
        ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def commit() -> str:
    """The commit of the clone that flexport runs from, else the version."""
    root = Path(flexport.__file__).resolve().parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)  # noqa: S603 - our own words
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass  # no git on this machine
    return f"v{flexport.__version__}"


def process_peak_bytes() -> int | None:
    """The most memory that this process has held, mapped files included; None if not known."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


_DISK_LANES = ("disk_to_host", "host_to_disk")


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"

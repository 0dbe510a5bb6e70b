"""The same law as with the fake engine, kept by `flexport run` itself with the demo model.

The run spills a share of everything to disk, so what a killed run leaves there shows as well.
FLEXPORT_TEST_KILLS sets how often it is killed.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from flexport import demo
from flexport.cli.main import main

NUM_KILLS = int(os.environ.get("FLEXPORT_TEST_KILLS", "3"))
NUM_ROWS = 48


def options(source: Path, output: Path, offload_dir: Path) -> list[str]:
    return [
        "run",
        *("--input", str(source), "--output", str(output), "--resume"),
        *("--dtype", "float32", "--batch-size", "8", "--num-batches", "2"),
        *("--percent", "50", "40", "60", "20", "60", "20", "--offload-dir", str(offload_dir)),
    ]


def kill_once_it_has(arguments: list[str], output: Path, num_bytes: int) -> bool:
    """Start a run and kill it when the output is that large; False if it ended before."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flexport", *arguments], stderr=subprocess.DEVNULL
    )
    while process.poll() is None:
        time.sleep(1e-3)  # to look all the time would take a core from it
        if output.exists() and output.stat().st_size >= num_bytes:
            process.kill()
            process.wait()
            return True
    return False


def test_the_demo_killed_at_random_moments_and_resumed_has_every_row_once(tmp_path: Path) -> None:
    source, offload_dir = tmp_path / "in.jsonl", tmp_path / "offload"
    lines = demo.INPUT_PATH.read_text(encoding="utf-8").splitlines()[:NUM_ROWS]
    source.write_text("\n".join(lines), encoding="utf-8")
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    assert main(options(source, undisturbed, offload_dir)) == 0
    rng = random.Random(3)
    # The first row of a block may be one of the last: a kill after the last row is none.
    last = undisturbed.stat().st_size * 3 // 4
    moments = sorted(rng.randrange(last) for _ in range(NUM_KILLS))

    resuming = options(source, output, offload_dir)
    num_kills = sum(kill_once_it_has(resuming, output, moment) for moment in moments)
    assert main(resuming) == 0

    rows, expected = (
        sorted((json.loads(line) for line in path.read_text().splitlines()), key=lambda r: r["id"])
        for path in (output, undisturbed)
    )
    assert num_kills > 0
    assert [row["id"] for row in rows] == sorted(json.loads(line)["id"] for line in lines)
    assert rows == expected
    assert list(offload_dir.iterdir()) == []

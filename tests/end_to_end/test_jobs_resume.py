"""Kill -9 at any moment, then `--resume`: the union of rows is that of an uninterrupted run.

The job is the real one, with its files and its process; only the engine is a fake, so that a run
is over in a moment and many kills fit into a test.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flexport.errors import UsageError
from flexport.output.sink import FileSink

JOB = """
import sys
from pathlib import Path
from flexport.apps.batch import run_job
from flexport.intake.encode import Encoder
from flexport.intake.jsonl import read_rows
from flexport.output.sink import FileSink
from flexport.records import SamplingParams
from flexport.testing.fake_engine import ByteTokenizer, FakeEngine

source, output = sys.argv[1:]
encoder = Encoder(ByteTokenizer(), SamplingParams(max_tokens=20), max_positions=120)
stream = sys.stdin.buffer if source == "-" else open(source, "rb")
with FileSink.resume(Path(output)) as sink, stream:
    run_job(FakeEngine(), read_rows(stream), sink, encoder=encoder, model="fake",
            finished=sink.finished)
"""

NUM_ROWS = 3000
NUM_KILLS = 20


def input_lines() -> list[str]:
    """Rows of all kinds: good ones in three forms, and a bad one every few lines."""
    rng = random.Random(7)
    lines = []
    for number in range(NUM_ROWS):
        prompt = "x" * rng.randint(1, 90)
        row: dict[str, Any] = {"id": f"row-{number}", "prompt": prompt}
        match number % 10:
            case 3:
                body = {"prompt": prompt, "max_tokens": rng.randint(1, 30)}
                row = {"custom_id": f"row-{number}", "url": "/v1/completions", "body": body}
            case 5:
                row["id"] = f"row-{number - 1}"  # used before
            case 7:
                row["prompt"] = "x" * 200  # too long
            case 9:
                row["temperature"] = "hot"
        lines.append(json.dumps(row) if number % 31 else "{torn")
    return lines


def rows_of(path: Path) -> Counter[str]:
    """Output rows without what is random about them."""
    rows: Counter[str] = Counter()
    for line in path.read_text().splitlines():
        row = json.loads(line)
        if "custom_id" in row:
            del row["id"], row["response"]["request_id"]
            del row["response"]["body"]["id"], row["response"]["body"]["created"]
        rows[json.dumps(row)] += 1
    return rows


def start(source: Path, output: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", JOB, str(source), str(output)])


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=60) == 0


def kill_once_it_has(process: subprocess.Popen[bytes], output: Path, num_bytes: int) -> bool:
    """Kill the process when the output is that large; False if it ended by itself before."""
    while process.poll() is None:
        time.sleep(1e-3)  # to look all the time would take a core from it
        if output.exists() and output.stat().st_size >= num_bytes:
            process.kill()
            process.wait()
            return True
    return False


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(input_lines()))
    return path


def test_killed_at_random_moments_and_resumed_a_job_has_every_row_once(
    source: Path, tmp_path: Path
) -> None:
    undisturbed, output = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    finish(start(source, undisturbed))
    whole_bytes = undisturbed.stat().st_size
    rng = random.Random(11)
    moments = sorted(rng.randrange(whole_bytes) for _ in range(NUM_KILLS))

    num_kills = sum(kill_once_it_has(start(source, output), output, moment) for moment in moments)
    finish(start(source, output))

    assert num_kills > NUM_KILLS // 2, "the job ended too soon for this test to mean anything"
    assert rows_of(output) == rows_of(undisturbed)
    assert sum(rows_of(output).values()) == NUM_ROWS


def test_a_living_job_has_the_lock_and_a_killed_one_leaves_none(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    arguments = [sys.executable, "-c", JOB, "-", str(output)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write("\n".join(input_lines()).encode())
        process.stdin.flush()  # and it waits for more
        while not output.exists() or output.stat().st_size == 0:
            assert process.poll() is None
            time.sleep(1e-3)

        try:
            with pytest.raises(UsageError, match="another run is writing"):
                FileSink.resume(output)
        finally:
            process.kill()

    with FileSink.resume(output) as sink:
        assert sink.finished.num_answers + sink.finished.num_errors > 0

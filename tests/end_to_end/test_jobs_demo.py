"""What a newcomer's first command does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from flexport import demo
from flexport.cli.main import main


def test_flexport_run_alone_runs_the_embedded_job_and_says_how_well_it_went() -> None:
    arguments = [sys.executable, "-m", "flexport", "run"]

    done = subprocess.run(arguments, capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    found = re.search(r"demo: (\d+) of (\d+) unseen records read exactly right", done.stderr)
    assert found is not None, done.stderr
    assert int(found[1]) >= 0.95 * int(found[2]) > 0


def test_the_demo_with_an_output_keeps_a_row_for_every_record(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"

    code = main(["run", "--output", str(output)])

    assert code == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(demo.expected())
    assert demo.accuracy(rows).share >= 0.95

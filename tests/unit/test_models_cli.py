"""`flexport models` lists families and known models, quickly."""

from __future__ import annotations

import json
import subprocess
import sys

from flexport.cli.main import main
from flexport.models import families, known_names


def test_the_json_list_has_every_known_model_with_its_size(capsys):
    code = main(["models", "--json"])

    data = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [row["family"] for row in data["families"]] == [f.model_type for f in families()]
    assert {"family": "opt", "from": "flexport"} in data["families"]
    assert [row["model"] for row in data["models"]] == list(known_names())
    (row,) = (row for row in data["models"] if row["model"] == "facebook/opt-1.3b")
    assert row["parameters"] == 1_315_758_080
    assert row["kv_bytes_per_token"] == 196_608


def test_the_table_names_every_known_model(capsys):
    code = main(["models"])

    out = capsys.readouterr().out
    assert code == 0
    assert all(name in out for name in known_names())
    assert "174.60 B" in out


def test_listing_models_needs_no_torch():
    probe = "import sys; from flexport.cli import main; code = main.main(['models']); "
    probe += "assert 'torch' not in sys.modules; sys.exit(code)"

    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr.decode()

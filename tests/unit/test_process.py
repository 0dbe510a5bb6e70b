"""Settings for the libraries under torch, and memory given back."""

from __future__ import annotations

import os
import subprocess
import sys

from flexport import process


def test_settings_are_made_unless_the_user_has_made_them(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    monkeypatch.delenv("LRU_CACHE_CAPACITY", raising=False)

    process.prepare()

    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["LRU_CACHE_CAPACITY"] == "64"


def test_the_settings_are_made_before_torch_is_imported_from_python_too():
    script = (
        "import os, sys, flexport\n"
        "assert 'torch' not in sys.modules and 'GOMP_SPINCOUNT' not in os.environ\n"
        "flexport.LLM\n"
        "assert 'torch' not in sys.modules and os.environ['GOMP_SPINCOUNT'] == '3000'\n"
    )
    bare = {name: value for name, value in os.environ.items() if name not in process.SETTINGS}

    subprocess.run([sys.executable, "-c", script], check=True, env=bare)


def test_trimming_the_heap_disturbs_nobody():
    kept = [bytes([number]) * 100_000 for number in range(20)]

    process.trim_heap()

    assert all(block == bytes([number]) * 100_000 for number, block in enumerate(kept))

"""transformers with all weights in memory, as its documentation shows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexport.bench.peers.generate import peer_main

__all__ = ["load"]


def load(model: Path, _: Path, __: int | None) -> Any:
    """The model, in the checkpoint's own dtype."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype="auto")


if __name__ == "__main__":
    sys.exit(peer_main(load))

"""transformers with accelerate's own placement: what fits on the device, then the host, then disk.

The cap is on weights alone: what generating takes comes on top, which is in the peer's favour.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexport.bench.peers.generate import peer_main

__all__ = ["load"]


def load(model: Path, scratch: Path, device_bytes: int | None) -> Any:
    """The model, with at most `device_bytes` of its weights on the first device."""
    import psutil
    from transformers import AutoModelForCausalLM

    assert device_bytes is not None, "this peer needs --device-memory"
    places: dict[int | str, int] = {0: device_bytes, "cpu": psutil.virtual_memory().available}
    return AutoModelForCausalLM.from_pretrained(
        model,
        dtype="auto",
        device_map="auto",
        max_memory=places,
        offload_folder=scratch / "accelerate",
    )


if __name__ == "__main__":
    sys.exit(peer_main(load))

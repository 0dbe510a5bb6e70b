"""transformers with accelerate's disk offload: every layer is read from disk when it is its turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexport.bench.peers.generate import peer_main

__all__ = ["load"]


def load(model: Path, scratch: Path, _: int | None) -> Any:
    """The model with its embedding and head in memory, and its layers on disk."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    decoder = "model.decoder"
    places = {
        **{
            f"{decoder}.{part}": "cpu"
            for part in ("embed_tokens", "embed_positions", "final_layer_norm")
        },
        **{f"{decoder}.layers.{i}": "disk" for i in range(config.num_hidden_layers)},
        "lm_head": "cpu",
    }
    return AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=places, offload_folder=scratch / "accelerate"
    )


if __name__ == "__main__":
    sys.exit(peer_main(load))

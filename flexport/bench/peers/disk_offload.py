"""transformers with accelerate's disk offload: every layer is read from disk when it is its turn."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexport.bench.peers.generate import peer_main

__all__ = ["load"]


def load(model: Path, scratch: Path, _: int | None) -> Any:
    """The model with its embedding and head in memory, and its layers on disk."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    decoder = next(name for name, _ in made.named_modules() if name.endswith(".layers"))
    parent = decoder.rpartition(".")[0]
    places = {
        **{
            f"{parent}.{name}": "cpu"
            for name, _ in made.get_submodule(parent).named_children()
            if name != "layers"
        },
        **{f"{decoder}.{i}": "disk" for i in range(len(made.get_submodule(decoder)))},
        "lm_head": "cpu",
    }
    return AutoModelForCausalLM.from_pretrained(
        model, dtype="auto", device_map=places, offload_folder=scratch / "accelerate"
    )


if __name__ == "__main__":
    sys.exit(peer_main(load))

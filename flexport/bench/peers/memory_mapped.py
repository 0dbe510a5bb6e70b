"""transformers with weights that stay in the file: mapped, read when touched, evicted at will.

The model is made without memory and given the mapped tensors in place of its own, so nothing
copies them; how far that holds shows in the anonymous memory of the process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from flexport.bench.peers.generate import peer_main

__all__ = ["load"]


def load(model: Path, _: Path, __: int | None) -> Any:
    """The model on mapped weights."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    missing, unexpected = made.load_state_dict(
        load_file(model / "model.safetensors"), strict=False, assign=True
    )
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    made.tie_weights()
    for name, module in list(made.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            # What is worked out and in no file: the angles of rotary positions.
            parent, _, own = name.rpartition(".")
            setattr(made.get_submodule(parent), own, type(module)(config))
    left = [name for name, weight in made.named_parameters() if weight.is_meta]
    left += [name for name, buffer in made.named_buffers() if buffer.is_meta]
    assert not left, left
    return made


if __name__ == "__main__":
    sys.exit(peer_main(load))

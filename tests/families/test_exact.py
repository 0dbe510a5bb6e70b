"""What picks experts is not rounded to the dtype computed in, wherever it lives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import VARIANTS, Variant, make
from torch import Tensor

import flexport
from flexport import Policy, SamplingParams
from flexport.models import experts as experts_module
from flexport.testing.discrete import DiscreteBackend

ROUTERS = {
    # family: its variant, and what it calls the router's tensors
    "deepseek_v3": ("the best groups", {"router.correction": "gate.e_score_correction_bias"}),
    "ernie4_5_moe": (
        "shared experts",
        {"router.correction": "moe_statics.e_score_correction_bias"},
    ),
    "gpt_oss": ("its own rope", {"router.bias": "router.bias"}),
}

MIXES = {
    "resident": [100, 0, 100, 0, 100, 0],
    "from the host": [0, 100, 100, 0, 100, 0],
    "from disk": [0, 0, 100, 0, 100, 0],
    "cut": [40, 30, 100, 0, 100, 0],
}


def make_mixed(variant: Variant, directory: Path, others: torch.dtype) -> dict[str, Tensor]:
    """The model with all but its routers' tensors in another dtype; returns what it saved."""
    make(variant, directory)
    state: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors*"):
        if path.suffix == ".safetensors":
            state.update(load_file(path))
        path.unlink()
    is_router = ("gate.weight", "router.weight", "router.bias", "e_score_correction_bias")
    state = {n: t if n.endswith(is_router) else t.to(others) for n, t in state.items()}
    save_file(state, directory / "model.safetensors")
    return state


@pytest.mark.parametrize("others", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("family", ROUTERS)
def test_a_router_has_the_numbers_of_its_file_in_a_run_in_bfloat16(
    family, mix, others, tmp_path, monkeypatch
):
    name, slots = ROUTERS[family]
    base, changes = VARIANTS[family]
    state = make_mixed(Variant(family, name, {**base, **changes[name]}), tmp_path, others)
    seen: dict[str, list[Tensor]] = {slot: [] for slot in ("router.weight", *slots)}
    as_it_is = experts_module.picked_experts

    def watched(experts: Any, weights: Any, x_TD: Tensor) -> Any:
        seen["router.weight"].append(weights.matrix("router").clone())
        for slot in slots:
            seen[slot].append(weights.vector(slot).clone())
        return as_it_is(experts, weights, x_TD)

    monkeypatch.setattr(experts_module, "picked_experts", watched)
    weights, cache, activations = Policy.splits_from_percent(MIXES[mix])
    policy = Policy(weights=weights, cache=cache, activations=activations, batch_size=2)
    backend = DiscreteBackend(memory_bytes=1 << 30)
    memory: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB"}

    with flexport.LLM(tmp_path, backend=backend, dtype="bfloat16", policy=policy, **memory) as llm:
        llm.generate([[5, 17, 60], [40]], SamplingParams(max_tokens=2, ignore_eos=True))
        report = llm.report
    backend.close()

    endings: dict[str, Any] = {"router.weight": ("gate.weight", "router.weight"), **slots}
    for slot, tensors in seen.items():
        saved = [tensor.flatten() for n, tensor in state.items() if n.endswith(endings[slot])]
        assert tensors
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        assert all(any(torch.equal(t.flatten(), own) for own in saved) for t in tensors)
        assert not any(torch.equal(own, own.bfloat16().float()) for own in saved)
    for tier in ("device", "host"):
        assert report["peak_bytes"][tier] <= report["predicted"][f"{tier}_bytes"]

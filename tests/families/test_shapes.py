"""The configs known by name are those of the published models, as far as their sizes tell."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexport.models import known_config, known_names, num_parameters, spec_of

# What the models' cards and reports say, in billions.
PROMISED = {
    "opt-350m": 0.331, "opt-1.3b": 1.316, "opt-30b": 29.97, "opt-175b": 174.6,
    "galactica-30b": 29.97, "TinyLlama-1.1B-Chat-v1.0": 1.100, "Llama-2-7b-hf": 6.738,
    "Llama-2-70b-hf": 68.98, "Llama-3.1-8B": 8.030, "Llama-3.1-70B": 70.55,
    "Llama-3.1-405B": 405.9, "Llama-3.2-1B": 1.236, "Llama-3.2-3B": 3.213,
    "Qwen2.5-0.5B": 0.494, "Qwen2.5-7B": 7.616, "Qwen2.5-72B": 72.71, "Qwen3-0.6B": 0.596,
    "Qwen3-4B": 4.022, "Qwen3-8B": 8.191, "Qwen3-32B": 32.76, "Qwen3-30B-A3B": 30.53,
    "Qwen3-235B-A22B": 235.1, "Mistral-7B-v0.3": 7.248, "Mixtral-8x7B-v0.1": 46.70,
    "Mixtral-8x22B-v0.1": 140.6, "gemma-2-2b": 2.614, "gemma-2-9b": 9.242, "gemma-2-27b": 27.23,
    "gemma-3-1b-pt": 1.000, "gemma-3-27b-pt": 27.01, "gpt-oss-20b": 20.91,
    "gpt-oss-120b": 116.8, "DeepSeek-V3": 671.0,
}  # fmt: skip


@pytest.mark.parametrize("name", PROMISED)
def test_a_known_model_has_as_many_parameters_as_its_makers_say(name):
    config = known_config(name)
    assert config is not None

    assert num_parameters(spec_of(config)) / 1e9 == pytest.approx(PROMISED[name], rel=2e-3)


@pytest.mark.parametrize("name", known_names())
def test_parameters_are_counted_as_transformers_counts_them(name):
    values = known_config(name)
    assert values is not None
    config = AutoConfig.for_model(**values)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)

    # What corrects a router's scores is a buffer there.
    corrections = [b for name, b in model.named_buffers() if name.endswith("correction_bias")]

    found = num_parameters(spec_of(values))

    assert found == sum(p.numel() for p in (*model.parameters(), *corrections))

"""Sizes of published models, and the laws that tie a spec's numbers together."""

from __future__ import annotations

from typing import Any

import pytest

from flexport.models import (
    attention_flops,
    known_config,
    kv_bytes_per_token,
    layer_flops,
    layer_tensors,
    num_parameters,
    spec_of,
)
from flexport.models.spec import Mlp, ModelSpec
from flexport.models.tensors import distinct_layers

# arXiv:2205.01068, table 1: layers, heads, width. Head widths follow.
OPT_TABLE = {
    "opt-125m": (12, 12, 768, 64),
    "opt-350m": (24, 16, 1024, 64),
    "opt-1.3b": (24, 32, 2048, 64),
    "opt-2.7b": (32, 32, 2560, 80),
    "opt-6.7b": (32, 32, 4096, 128),
    "opt-13b": (40, 40, 5120, 128),
    "opt-30b": (48, 56, 7168, 128),
    "opt-66b": (64, 72, 9216, 128),
    "opt-175b": (96, 96, 12288, 128),
}

# What transformers counts: sum(p.numel() for p in OPTForCausalLM(config).parameters()).
PARAMETERS = {
    "opt-125m": 125_239_296,
    "opt-350m": 331_196_416,
    "opt-1.3b": 1_315_758_080,
    "galactica-1.3b": 1_315_201_024,
}


def known_spec(name: str) -> ModelSpec:
    config: dict[str, Any] | None = known_config(name)
    assert config is not None, name
    return spec_of(config)


@pytest.mark.parametrize("name", OPT_TABLE)
def test_the_opt_sizes_are_those_of_the_paper(name):
    spec = known_spec(name)

    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    found = (spec.num_layers, attention.num_heads, spec.hidden_size, attention.cache_dim)

    assert found == OPT_TABLE[name]
    assert isinstance(mlp, Mlp)
    assert mlp.size == 4 * spec.hidden_size
    assert spec.max_positions == 2048


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted_as_transformers_counts_them(name):
    assert num_parameters(known_spec(name)) == PARAMETERS[name]


def test_a_tied_head_is_the_embeddings_tensor_again():
    spec = known_spec("opt-125m")

    (tokens,) = (t for t in layer_tensors(spec, 0) if t.slot == "tokens.weight")
    (head,) = (t for t in layer_tensors(spec, spec.head_layer) if t.slot == "head.weight")

    assert (head.names, head.shape) == (tokens.names, tokens.shape)


def test_an_untied_head_is_a_tensor_of_its_own_and_counts_as_one():
    tied = spec_of({"model_type": "opt"})
    untied = spec_of({"model_type": "opt", "tie_word_embeddings": False})

    names = layer_tensors(untied, untied.head_layer)[-1].names

    assert names == ("lm_head.weight",)
    table = tied.vocab_size * tied.embed_size
    assert num_parameters(untied) - num_parameters(tied) == table


def test_the_350m_projects_on_both_sides_and_has_no_final_norm():
    spec = known_spec("opt-350m")

    embed = {t.slot: t.shape for t in layer_tensors(spec, 0)}
    head = {t.slot: t.shape for t in layer_tensors(spec, spec.head_layer)}

    assert embed == {
        "tokens.weight": (50272, 512),
        "project_in.weight": (1024, 512),
        "positions.weight": (2050, 1024),
    }
    assert head == {"project_out.weight": (512, 1024), "head.weight": (50272, 512)}


def test_a_layer_without_biases_and_norm_weights_is_matrices_alone():
    spec = known_spec("galactica-30b")

    kinds = {t.kind for t in layer_tensors(spec, 1)}

    assert kinds == {"matrix"}


def test_alike_layers_are_counted_together():
    spec = known_spec("gemma-2-2b")  # every other layer has a window

    assert distinct_layers(spec) == {1: 13, 2: 13}


def test_every_decoder_layer_has_its_own_names():
    spec = known_spec("opt-125m")

    names = [
        tensor.names[0]
        for layer in range(1, spec.head_layer)
        for tensor in layer_tensors(spec, layer)
    ]

    assert len(names) == len(set(names)) == 12 * 16
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in names
    assert "model.decoder.layers.11.fc2.bias" in names


def test_one_token_of_opt_1_3b_takes_196_kb_of_cache():
    spec = known_spec("opt-1.3b")

    num_bytes = spec.num_layers * kv_bytes_per_token(spec, 0, 2)

    assert num_bytes == 196_608


def test_flops_are_two_a_matrix_value_and_four_a_key_and_feature():
    spec = known_spec("opt-125m")
    hidden = spec.hidden_size

    assert layer_flops(spec, 0) == 0
    assert layer_flops(spec, 1) == 2 * 12 * hidden * hidden
    assert layer_flops(spec, spec.head_layer) == 2 * spec.vocab_size * hidden
    assert attention_flops(spec, 0, 100) == 4 * hidden * 100

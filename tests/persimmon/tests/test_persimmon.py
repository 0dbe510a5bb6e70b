"""Persimmon computes what transformers computes, and what it can't compute it refuses."""

import pytest
from flexport_persimmon import spec

from flexport.errors import UnsupportedModel
from flexport.testing import FamilyConformance, Variant

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}

ALL_TURNS = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}


class TestPersimmon(FamilyConformance):
    variants = (
        Variant("persimmon", "8b", SIZES),
        Variant(
            "persimmon",
            "no norms of heads, gelu",
            {**SIZES, "qk_layernorm": False, "hidden_act": "gelu"},
        ),
        Variant(
            "persimmon",
            "all of a head turns, tied head",
            {**SIZES, "rope_parameters": ALL_TURNS, "tie_word_embeddings": True},
        ),
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_act", "mish"), ("num_attention_heads", 5), ("num_key_value_heads", 2)],
)
def test_what_can_not_be_run_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedModel, match=field):
        spec({**SIZES, field: value})


def test_the_published_model_is_read_with_its_old_fields():
    published = {"rope_theta": 25000.0, "rope_scaling": None, "partial_rotary_factor": 0.5}

    rope = spec(published).layers[0].attention.rope

    assert rope is not None
    assert rope.frequencies[1] == pytest.approx(25000.0 ** (-2 / 32))

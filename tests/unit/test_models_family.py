"""Configs become specs, or are refused by the name of what is wrong in them."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from flexport.errors import UnsupportedModel
from flexport.models import about, families, known_config, layer_tensors, spec_of

OPT = {"model_type": "opt"}


def install(folder: Path, distribution: str, entry: str, code: str = "") -> None:
    """Lay an installed package into `folder`: metadata with one entry point, and its module."""
    module = distribution.replace("-", "_")
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Name: {distribution}\nVersion: 1.0\nSummary: Models of {distribution}\n"
    )
    (metadata / "entry_points.txt").write_text(f"[flexport.models]\n{entry}\n")
    (folder / f"{module}.py").write_text(dedent(code))


def test_absent_fields_have_the_defaults_of_transformers():
    spec = spec_of(OPT)

    assert (spec.vocab_size, spec.hidden_size, spec.num_layers) == (50272, 768, 12)
    assert (spec.layers[0].norms, spec.final_norm) == ("input", True)
    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (2, (2,), 1)


def test_a_null_field_counts_as_absent_except_for_token_ids():
    spec = spec_of({**OPT, "word_embed_proj_dim": None, "eos_token_id": None})

    assert spec.embed_size == spec.hidden_size
    assert spec.eos_token_ids == ()


def test_several_ends_are_all_kept():
    assert spec_of({**OPT, "eos_token_id": [2, 7]}).eos_token_ids == (2, 7)


def test_the_ends_of_the_generation_config_win():
    assert spec_of(OPT, {"eos_token_id": [5, 6]}).eos_token_ids == (5, 6)
    assert spec_of(OPT, {"max_length": 20}).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "768"),
        ("hidden_size", True),
        ("num_hidden_layers", 1.5),
        ("do_layer_norm_before", "yes"),
        ("activation_function", "mish"),
        ("activation_function", 3),
        ("eos_token_id", -1),
        ("eos_token_id", [2, "3"]),
        ("bos_token_id", "2"),
        ("scale_embeddings", True),
        ("learned_embeddings", False),
    ],
)
def test_a_field_that_can_not_be_run_is_refused_by_name_and_value(field, value):
    with pytest.raises(UnsupportedModel) as refusal:
        spec_of({**OPT, field: value})

    assert field in str(refusal.value)
    assert repr(value) in str(refusal.value)


def test_heads_that_do_not_divide_the_hidden_size_are_refused():
    with pytest.raises(UnsupportedModel, match=r"768 is not a multiple of num_attention_heads 7"):
        spec_of({**OPT, "num_attention_heads": 7})


def test_an_unknown_family_is_refused_with_those_of_like_names_alone():
    with pytest.raises(UnsupportedModel) as refusal:
        spec_of({"model_type": "qwen3_mo"})

    assert "no model family 'qwen3_mo'; close to it: qwen3_moe, " in str(refusal.value)
    assert f"`flexport models` lists the {len(families())} there are" in str(refusal.value)
    assert "opt" not in str(refusal.value)


def test_an_unknown_family_like_no_other_is_told_where_they_are_listed():
    with pytest.raises(UnsupportedModel, match=r"no model family 'rwkv'; `flexport models` lists"):
        spec_of({"model_type": "rwkv"})


@pytest.mark.parametrize("config", [{}, {"model_type": None}, {"model_type": ["opt"]}])
def test_a_config_without_a_model_type_is_refused(config):
    with pytest.raises(UnsupportedModel, match="has no model_type"):
        spec_of(config)


def test_an_installed_package_adds_a_family(tmp_path, monkeypatch):
    code = """
        from dataclasses import replace

        from flexport.models import opt

        def spec(config):
            base = opt.spec({})
            return replace(base, family="acme", layers=base.layers[:1] * config["depth"])
    """
    install(tmp_path, "acme-models", "acme = acme_models:spec", code)
    monkeypatch.syspath_prepend(tmp_path)

    spec = spec_of({"model_type": "acme", "depth": 5})

    assert (spec.family, spec.num_layers) == ("acme", 5)
    assert layer_tensors(spec, 5)[0].names[0].startswith("model.decoder.layers.4.")
    listed = [(f.model_type, f.source) for f in families()]
    assert listed[0] == ("acme", "acme-models")
    assert ("opt", "flexport") in listed
    assert about("acme") == "Models of acme-models"


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("broken = broken_models:spec", "can't be imported"),
        ("broken = broken_models:absent", "can't be imported"),
        ("broken = json:__name__", "not a function"),
        ("broken = json:dumps", "gave a str in place of a ModelSpec"),
    ],
)
def test_a_broken_package_is_reported_and_hurts_no_other_family(
    tmp_path, monkeypatch, entry, complaint
):
    install(tmp_path, "broken-models", entry, "def spec(config):\n    pass\n1 / 0")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(UnsupportedModel, match=complaint):
        spec_of({"model_type": "broken"})

    assert spec_of(OPT).family == "opt"
    assert {"broken", "opt"} <= {f.model_type for f in families()}


def test_a_family_that_two_packages_add_is_refused_with_both_names(tmp_path, monkeypatch):
    install(tmp_path / "a", "first-models", "twin = json:dumps")
    install(tmp_path / "b", "second-models", "twin = json:loads")
    monkeypatch.syspath_prepend(tmp_path / "a")
    monkeypatch.syspath_prepend(tmp_path / "b")

    with pytest.raises(UnsupportedModel, match=r"\(first-models, second-models\); keep one"):
        spec_of({"model_type": "twin"})


def test_a_package_can_not_take_the_place_of_a_family_of_ours(tmp_path, monkeypatch):
    install(tmp_path, "usurper", "opt = json:dumps")
    monkeypatch.syspath_prepend(tmp_path)

    assert spec_of(OPT).family == "opt"
    assert {f.source for f in families()} == {"flexport"}


def test_known_models_are_found_with_and_without_their_organisation():
    assert known_config("opt-30b") == known_config("facebook/opt-30b") is not None
    assert known_config("other/opt-30b") is None
    assert known_config("qwen/qwen3-8b") == known_config("Qwen3-8B") is not None
    assert known_config("opt-31b") is None


def test_a_known_config_is_a_copy():
    config = known_config("opt-125m")
    assert config is not None
    config["hidden_size"] = 1

    again = known_config("opt-125m")

    assert again is not None
    assert again["hidden_size"] == 768

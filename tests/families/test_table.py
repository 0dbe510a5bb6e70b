"""Every family of ours is small, says which models it has, and is tested."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from tiny_families import variants
from transformers import AutoConfig

import flexport.models
from flexport.models import about, families

OURS = sorted(family.model_type for family in families() if family.source == "flexport")

MODULES = sorted(
    path.stem
    for path in Path(flexport.models.__path__[0]).glob("*.py")
    if "\ndef spec(" in path.read_text(encoding="utf-8")
)

MOST_LINES = 140

README = Path(__file__).parent.parent.parent / "README.md"


def test_every_family_has_a_tiny_variant():
    met = set()
    for variant in variants():
        config = AutoConfig.for_model(variant.family, **variant.config)
        met |= {variant.family, config.get_text_config().model_type}

    assert set(OURS) <= met


@pytest.mark.parametrize("name", MODULES)
def test_a_family_is_one_small_file_named_after_its_model_type(name):
    module = import_module(f"flexport.models.{name}")
    assert module.__file__ is not None
    assert module.__doc__ is not None

    lines = Path(module.__file__).read_text(encoding="utf-8").splitlines()

    assert name in OURS
    assert f'(`model_type` "{name}")' in module.__doc__.splitlines()[0]
    assert len(lines) <= MOST_LINES


def test_the_readme_names_every_family_that_a_checkpoint_may_be_of():
    part = README.read_text(encoding="utf-8").split("## Which models\n")[1].split("\n- ")[0]

    named = set(re.findall(r"`(\w+)`", part))

    assert named == {name for name in OURS if not name.endswith("_vl_text")}


@pytest.mark.parametrize("name", OURS)
def test_a_family_says_in_a_line_which_models_it_has(name):
    assert 3 <= len(about(name)) <= 80
    assert "`" not in about(name)

"""Each family of ours computes what transformers computes, wherever its tensors live."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import make, variants

from flexport.engine.source import open_source
from flexport.models.decoder import head
from flexport.testing import FamilyConformance
from flexport.testing.families.layers import WholeWeights, whole_state


class TestOurs(FamilyConformance):
    variants = tuple(variants())


@torch.no_grad()
@pytest.mark.parametrize("variant", list(variants()), ids=str)
def test_the_head_leaves_the_hidden_states_as_they_were(variant, tmp_path):
    make(variant, tmp_path)
    source = open_source(str(tmp_path), None, "auto")
    weights = WholeWeights(source.spec, source.spec.head_layer, whole_state(source))
    x_TD = torch.randn(5, source.spec.hidden_size)
    before_TD = x_TD.clone()

    head(source.spec, weights, x_TD)

    assert torch.equal(x_TD, before_TD)


def test_a_family_without_variants_is_an_error_and_not_a_skip():
    metafunc: Any = None
    with pytest.raises(NotImplementedError, match="needs `variants`"):
        FamilyConformance().pytest_generate_tests(metafunc)

"""What a family of models promises: it computes what transformers computes, wherever tensors live.

Subclass `FamilyConformance`, list tiny `variants` that switch on each feature of the family's
configs, and run pytest. The laws are checked on a model of random weights that transformers makes
of each variant, layer by layer (`layers`) and through the whole engine (`mixes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file

from flexport.engine.source import open_source
from flexport.models import layer_tensors
from flexport.testing.families.layers import draw_rows, states_and_logits
from flexport.testing.families.mixes import Reference, cases, continuations, reference_of
from flexport.testing.families.tiny import Variant, make

__all__ = ["FamilyConformance", "Variant"]

TOLERANCE = 1e-4
"""float32 has 24 bits; three tiny layers in another order of summation lose a few of them."""


class FamilyConformance:
    """Subclass this and list the family's `variants`."""

    variants: ClassVar[Sequence[Variant]] = ()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Each law for each variant; those of whole runs in some mixes of places, too."""
        if not self.variants:
            raise NotImplementedError("a family's test class needs `variants`")
        if "mix" in metafunc.fixturenames:
            metafunc.parametrize(("variant", "mix"), list(cases(self.variants)))
        else:
            metafunc.parametrize("variant", self.variants, ids=str)

    @pytest.fixture
    def reference(self, variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Reference:
        """What transformers says, made once for all mixes of a variant."""
        return reference_of(variant, tmp_path_factory)

    @torch.no_grad()
    def test_ragged_rows_get_the_states_and_logits_that_transformers_gives_each_alone(
        self, variant: Variant, tmp_path: Path
    ) -> None:
        model = make(variant, tmp_path)
        source = open_source(str(tmp_path), None, "auto")
        rows_L = draw_rows(source.spec.vocab_size)

        states, logits_TV = states_and_logits(source, rows_L)

        expected: list[Any] = [
            model(input_ids=row_L[None], output_hidden_states=True) for row_L in rows_L
        ]
        assert logits_TV.dtype == torch.float32
        for index, state_TD in enumerate(states):
            theirs_TD = torch.cat([out.hidden_states[index][0] for out in expected])
            torch.testing.assert_close(state_TD, theirs_TD, rtol=TOLERANCE, atol=TOLERANCE)
        theirs_TV = torch.cat([out.logits[0] for out in expected])
        torch.testing.assert_close(logits_TV, theirs_TV, rtol=TOLERANCE, atol=TOLERANCE)

    def test_the_layers_own_every_tensor_of_the_checkpoint(
        self, variant: Variant, tmp_path: Path
    ) -> None:
        make(variant, tmp_path)
        spec = open_source(str(tmp_path), None, "auto").spec
        tensors = itertools.chain.from_iterable(
            layer_tensors(spec, layer) for layer in range(spec.num_schedule_layers)
        )

        owned = {name for tensor in tensors for name in tensor.names}

        saved = {name for path in tmp_path.glob("*.safetensors") for name in load_file(path)}
        assert {name for name in saved if not name.startswith(spec.unused)} <= owned

    def test_greedy_tokens_are_those_of_transformers(
        self, variant: Variant, mix: dict[str, Any], reference: Reference, tmp_path: Path
    ) -> None:
        assert continuations(reference, mix, tmp_path) == reference.continuations

"""The decoder gives transformers' logits, for every shape that the OPT family comes in.

Dimension key: R rows, L tokens of a row, T all tokens laid end to end, H heads, E features of a
head, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import OPTConfig, OPTForCausalLM

from flexport.models import ModelSpec, layer_tensors, spec_of
from flexport.models.decoder import decoder_layer, embed, head

TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 40,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "2.7b (uneven heads)": {"hidden_size": 40, "num_attention_heads": 5},
    "galactica-6.7b": {"activation_function": "gelu"},
    "galactica-30b": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    "no biases, norms with weights": {"enable_bias": False},
    "norms without weights after": {
        "layer_norm_elementwise_affine": False,
        "do_layer_norm_before": False,
    },
    "projected, norms before": {"word_embed_proj_dim": 48},
    "final norm removed": {"_remove_final_layer_norm": True},
    "head of its own": {"tie_word_embeddings": False},
    "gelu by tanh": {"activation_function": "gelu_new"},
    "silu": {"activation_function": "silu"},
}

# float32 has 24 bits; three tiny layers in another order of summation lose a few of them.
TOLERANCE = 1e-4


class DenseWeights:
    """A layer's weights, whole and in memory, found under their checkpoint names."""

    def __init__(self, spec: ModelSpec, layer: int, state: Mapping[str, Tensor]) -> None:
        self._tensors: dict[str, Tensor] = {}
        for tensor in layer_tensors(spec, layer):
            name = next(name for name in tensor.names if name in state)
            assert state[name].shape == tensor.shape, (name, state[name].shape, tensor.shape)
            self._tensors[tensor.slot] = state[name]

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        weight_FD = self._tensors[f"{part}.weight"]
        return functional.linear(x_TD, weight_FD, self._tensors.get(f"{part}.bias"))

    def linears(self, x_TD, parts):
        return [self.linear(x_TD, part) for part in parts]

    def vector(self, slot: str) -> Tensor:
        return self._tensors[slot]

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        return self._tensors[f"{part}.weight"][ids_T]


class RowAttention:
    """Causal attention of each row over itself, with no cache."""

    def __init__(self, spec: ModelSpec, lengths: Sequence[int]) -> None:
        self._scale = spec.attention_scale
        self._lengths = list(lengths)

    def __call__(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        rows = zip(*(x.split(self._lengths) for x in (q_THE, k_TKE, v_TKE)), strict=True)
        return torch.cat([self._attend_row(*row) for row in rows])

    def _attend_row(self, q_LHE: Tensor, k_LHE: Tensor, v_LHE: Tensor) -> Tensor:
        scores_HLL = torch.einsum("lhe,mhe->hlm", q_LHE, k_LHE) * self._scale
        future_LL = torch.ones_like(scores_HLL[0], dtype=torch.bool).triu(1)
        shares_HLL = scores_HLL.masked_fill(future_LL, float("-inf")).softmax(-1)
        return torch.einsum("hlm,mhe->lhe", shares_HLL, v_LHE)


def tiny_model(variant: Mapping[str, Any]) -> tuple[OPTForCausalLM, dict[str, Any]]:
    """A seeded random model whose every tensor matters, and its config as JSON would have it."""
    torch.manual_seed(0)
    config = OPTConfig(**{**TINY, **variant})
    model = OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh biases are 0 and fresh norm weights 1, which would hide a forgotten one.
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
    return model, config.to_dict()


def ragged_rows(lengths: Sequence[int], vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab_size, (length,), generator=generator) for length in lengths]


def flat_logits(spec: ModelSpec, state: Mapping[str, Tensor], rows_L: Sequence[Tensor]) -> Tensor:
    """All rows' logits laid end to end, computed in one go."""
    lengths = [len(row_L) for row_L in rows_L]
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    attend = RowAttention(spec, lengths)

    x_TD = embed(spec, DenseWeights(spec, 0, state), torch.cat(list(rows_L)), positions_T)
    for layer in range(1, spec.head_layer):
        x_TD = decoder_layer(spec, DenseWeights(spec, layer, state), x_TD, attend)
    return head(spec, DenseWeights(spec, spec.head_layer, state), x_TD)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_ragged_rows_get_the_logits_that_transformers_gives_each_alone(variant):
    model, config = tiny_model(variant)
    spec = spec_of(config)
    rows_L = ragged_rows([7, 1, 40, 12], spec.vocab_size)

    with torch.no_grad():
        logits_TV = flat_logits(spec, model.state_dict(), rows_L)
        expected_TV = torch.cat([model(input_ids=row_L[None]).logits[0] for row_L in rows_L])

    assert logits_TV.dtype == torch.float32
    torch.testing.assert_close(logits_TV, expected_TV, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("prefix", ["decoder.", ""])
def test_a_checkpoint_saved_without_the_language_model_wrapper_is_read_by_its_shorter_names(prefix):
    model, config = tiny_model({})
    spec = spec_of(config)
    rows_L = ragged_rows([5, 3], spec.vocab_size)
    state = {
        prefix + name.removeprefix("model.decoder."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.decoder.")
    }

    with torch.no_grad():
        shorter_TV = flat_logits(spec, state, rows_L)
        full_TV = flat_logits(spec, model.state_dict(), rows_L)

    torch.testing.assert_close(shorter_TV, full_TV, rtol=0, atol=0)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_the_layers_own_every_parameter_of_the_model_once(variant):
    model, config = tiny_model(variant)
    spec = spec_of(config)
    tensors = itertools.chain.from_iterable(
        layer_tensors(spec, layer) for layer in range(spec.num_schedule_layers)
    )

    owned = {tensor.names[0]: tensor.shape for tensor in tensors}

    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert owned == expected


def test_the_head_leaves_the_hidden_states_as_they_were():
    model, config = tiny_model({})
    spec = spec_of(config)
    x_TD = torch.randn(4, spec.hidden_size)
    before_TD = x_TD.clone()

    with torch.no_grad():
        head(spec, DenseWeights(spec, spec.head_layer, model.state_dict()), x_TD)

    assert torch.equal(x_TD, before_TD)

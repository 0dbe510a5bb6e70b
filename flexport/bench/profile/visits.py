"""What a visit of a decoder layer takes beside its products and its attention.

That is a fixed cost, for calls of kernels and what the engine does between them, and one for each
token: norms, rotations, activations and sums pass through its states. The first is seen in tiny
models, run by the engine, where there is nothing else; the second in one layer of the decoder
whose products and attention are there already.

Dimension key: T tokens, H query heads, K key/value heads, E features of a head, F features of
whatever a part gives, G columns of a page, N rows.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import flexport
from flexport.backend import Backend
from flexport.bench.profile.timing import Effort, Timed, fit_line, seconds_of_each
from flexport.bench.spread import Spread
from flexport.engine.turns import VisitTurns
from flexport.models import spec_of
from flexport.models.decoder import decoder_layer
from flexport.models.spec import Attention, ModelSpec
from flexport.models.tensors import layer_tensors, touched_values
from flexport.torch_ops import torch_dtype

__all__ = ["Visits", "touch_rate", "visit_costs"]

LAYER = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
"""A layer of TinyLlama 1.1B."""

TINY = {**LAYER, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2,
        "num_key_value_heads": 2}  # fmt: skip

TOUCH_TOKENS = (64, 256, 1024)

DEPTHS = (2, 10)
"""Layers of two tiny models: the difference has no embedding and no head in it."""

MANY_PIECES = 9

ROUNDS = 3

TINY_PAGES = 2
"""Of a row of a tiny model: its prompt's, and the one of what is decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """Seconds, what pages cost included."""

    visit_s: float
    piece_s: float
    spread: float


class _There:
    """Weights whose products are made: what is measured is all that is not a product.

    A product that the decoder writes to is what it was when it is asked for again: 20 * sigmoid(20)
    * 1 is 20. What is added to the states is 0, so that they do not grow.
    """

    def __init__(self, backend: Backend, spec: ModelSpec, num_tokens: int, dtype: torch.dtype):
        self._vectors: dict[str, Tensor] = {}
        self._products: dict[str, Tensor] = {}
        for tensor in layer_tensors(spec, 1):
            if tensor.kind == "norm":
                self._vectors[tensor.slot] = backend.allocate(tensor.shape, dtype).fill_(1.0)
            elif tensor.kind == "matrix":
                part = tensor.slot.removesuffix(".weight")
                product_TF = backend.allocate((num_tokens, tensor.shape[0]), dtype)
                self._products[part] = product_TF.fill_(_FILLED.get(part, 0.0))

    def linear(self, x_TD: Tensor, part: str) -> Tensor:
        return self._products[part]

    def linears(self, x_TD: Tensor, parts: Sequence[str]) -> list[Tensor]:
        return [self._products[part] for part in parts]

    def vector(self, slot: str) -> Tensor:
        return self._vectors[slot]

    def matrix(self, part: str) -> Tensor:
        raise AssertionError(f"a plain layer has no {part}")

    def rows(self, part: str, ids_T: Tensor) -> Tensor:
        raise AssertionError(f"a decoder layer has no {part}")

    def experts(self, picked: Sequence[int]) -> Iterator[int]:
        raise AssertionError("a plain layer has no experts")


_FILLED = {"gate": 20.0, "up": 1.0, "q": 1.0, "k": 1.0, "v": 1.0}


def touch_rate(backend: Backend, dtype: str, effort: Effort) -> Spread:
    """`touched_values` a second."""
    item = torch_dtype(dtype)
    spec = spec_of(LAYER)
    values = touched_values(spec, 1)
    # The MLP's two products, what becomes of them, and a norm in float32 are the most at once.
    fits = effort.pool_bytes // (item.itemsize * 2 * values)
    tokens = [each for each in TOUCH_TOKENS if each <= fits]
    if len(tokens) < 2:
        tokens = [1, 2]
    with torch.inference_mode():
        layers = [_layer(backend, spec, each, item, effort) for each in tokens]
        seconds = seconds_of_each(layers, effort.rounds)
    points = [(float(each), of.median) for each, of in zip(tokens, seconds, strict=True)]
    line = fit_line(points)
    found = values / line.slope if line.slope else values * tokens[-1] / points[-1][1]
    # The noise is that of the largest: it has most of what is looked for.
    return Spread.of([found * points[-1][1] / each_s for each_s in seconds[-1].values])


def _layer(
    backend: Backend, spec: ModelSpec, num_tokens: int, dtype: torch.dtype, effort: Effort
) -> Timed:
    """A layer whose products and attention are there."""
    layer = spec.layers[0]
    attention = layer.attention
    assert isinstance(attention, Attention), attention
    weights = _There(backend, spec, num_tokens, dtype)
    positions = range(num_tokens)
    turns = VisitTurns(backend, dtype, positions, positions, positions)
    attended = backend.allocate((num_tokens, attention.out_size), dtype).fill_(0.0)
    o_THE = attended.view(num_tokens, attention.num_heads, attention.head_dim)
    plane = (1, attention.num_kv_heads, num_tokens, attention.head_dim)
    pages = [backend.allocate(plane, dtype) for _ in range(2)]
    x_TD = backend.allocate((num_tokens, spec.hidden_size), dtype).fill_(1.0)

    def attend(
        q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor | None, sinks_H: Tensor | None
    ) -> Tensor:
        """Keys and values go to their pages, and what comes out to its place, as they do."""
        assert sinks_H is None, "a plain layer has no sinks"
        for page_1KGE, new_TKE in zip(pages, (k_TKE, v_TKE), strict=True):
            assert new_TKE is not None, "keys are no values here"
            page_1KGE[0] = new_TKE.transpose(0, 1)
        out_THE = torch.empty_like(q_THE)
        return out_THE.copy_(o_THE)

    return Timed(
        backend,
        lambda: decoder_layer(spec, layer, weights, x_TD, attend, turns),
        effort.kernel_s / effort.rounds,
    )


def visit_costs(backend: Backend, dtype: str, directory: Path, effort: Effort) -> Visits:
    """The engine's decode steps of rows of one token, alone and as pieces of one visit."""
    seconds: dict[tuple[int, int], Spread] = {}
    with tempfile.TemporaryDirectory(prefix="flexport-profile-", dir=directory) as folder:
        for depth in DEPTHS:
            model = Path(folder) / str(depth)
            model.mkdir()
            config = {**TINY, "num_hidden_layers": depth}
            (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
            for pieces in (1, MANY_PIECES):
                seconds[depth, pieces] = _step_seconds(
                    backend, dtype, model, Path(folder), pieces, effort
                )
    few, many = DEPTHS
    one_s, all_s = (
        (seconds[many, pieces].median - seconds[few, pieces].median) / (many - few)
        for pieces in (1, MANY_PIECES)
    )
    return Visits(
        visit_s=max(one_s, 0.0),
        piece_s=max(0.0, (all_s - one_s) / (MANY_PIECES - 1)),
        spread=max(each.spread for each in seconds.values()),
    )


def _step_seconds(
    backend: Backend, dtype: str, model: Path, directory: Path, pieces: int, effort: Effort
) -> Spread:
    """Seconds of a decode step of so many batches of one row, which pass each layer together."""
    memory = effort.pool_bytes
    policy = flexport.Policy(
        batch_size=1, num_batches=pieces, prefill_tokens=1024, sweep_tokens=1024
    )
    sampling = flexport.SamplingParams(max_tokens=effort.decode_steps + 1, ignore_eos=True)
    with flexport.LLM(
        model,
        load_format="dummy",
        backend=backend,
        dtype=dtype,
        policy=policy,
        device_memory=memory,
        host_memory=None if backend.capabilities.unified else memory,
        disk_memory=memory,
        offload_dir=directory,
    ) as llm:
        found = []
        for number in range(1 + min(ROUNDS, effort.rounds)):
            llm.generate([[5] * 4] * pieces, sampling)
            if number:  # the first job loads
                found.append(llm.report["seconds"]["decode"] / effort.decode_steps)
    return Spread.of(found)

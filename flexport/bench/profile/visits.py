"""What a visit of a decoder layer takes beside its products and the bytes that its attention reads.

That is a fixed cost, for calls of kernels and what the engine does between them, and one for each
token: norms, rotations, activations and sums pass through its states, its keys and values go to
their pages. All of it is measured where it happens, in the engine and with layers of a usual size:
what has just multiplied has pushed everything else out of the processor's caches, and a norm takes
three times as long there as in a loop of its own.

Products are timed meanwhile, one by one, and taken off at the rate that the largest of them had in
that very run; that smaller ones are less quick is a part of what is left.

An asynchronous device runs kernels while further ones are launched, and to wait for each product would
spoil that: there a visit is waited for as a whole. One of a single token takes as long as its launches;
from one of many, products are taken off at the rate that they were found to have.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

import flexport
from flexport.backend import Backend, PacksWeights
from flexport.bench.profile.attending import Reading
from flexport.bench.profile.layers import (
    DEPTH,
    HEAD_DIM,
    HIDDEN,
    Unpacked,
    open_layers,
    write_layers,
)
from flexport.bench.profile.timing import Effort
from flexport.bench.spread import Spread
from flexport.models import spec_of
from flexport.models.tensors import attention_flops, layer_tensors, touched_values
from flexport.planner.machine import Curve
from flexport.torch_ops import torch_dtype

__all__ = ["STEP_PROMPT", "Visits", "visit_costs"]

MANY_PIECES = 9

STEP_ROWS, STEP_PROMPT = 64, 16
"""Of decode steps of many rows, which see little cache."""

PROMPT_ROWS, PROMPT_TOKENS, PROMPT_BLOCKS = 8, 128, 8
"""Of prompts that pass a layer together, and how often some do."""

SHORT_PROMPT, SHORT_PAGES = 4, 2
"""Of a row alone: its tokens; and its pages, the prompt's and the one of what is decoded."""

ROUNDS = 3

LEAST = 0.25
"""Of what is left beside products, what each part of it is at least: the rest would be noise."""

NOISE = 0.01
"""Of a visit, what the difference of two measurements is at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """What `planner.machine.Computer` calls so."""

    visit_s: float
    piece_s: float
    touched_values_per_s: float
    stepped_values_per_s: float
    spread: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """One that was watched."""

    tokens: int
    values: int
    """Of its weight."""
    started_s: float
    taken_s: float


class _Watched(Unpacked):
    """One whose products are timed, each until the device has done it.

    Or, if the device is asynchronous, waited for with the last one of a layer's visit.
    """

    def __init__(self, own: Backend, layer_values: Sequence[int]) -> None:
        """`layer_values` are those of each matrix of a layer."""
        super().__init__(own)
        self.products: list[_Product] = []
        self.each = own.capabilities.addressable
        self._layer_values = layer_values
        self._num_in_layers = 0

    def pack(self, weight_FD: Tensor) -> Tensor:
        return self._own.pack(weight_FD) if isinstance(self._own, PacksWeights) else weight_FD

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        if self.each:
            self._own.sync()
        started_s = time.perf_counter()
        out_TF = self._own.matmul(x_TD, weight_FD, bias_F)
        tokens, features = out_TF.shape
        values = features * x_TD.shape[1]
        if values in self._layer_values:
            self._num_in_layers += 1
        if self.each or self._num_in_layers == len(self._layer_values):
            self._own.sync()
            self._num_in_layers = 0
        taken_s = time.perf_counter() - started_s
        self.products.append(
            _Product(tokens=tokens, values=values, started_s=started_s, taken_s=taken_s)
        )
        return out_TF


def visit_costs(
    backend: Backend,
    dtype: str,
    directory: Path,
    effort: Effort,
    rate_of_products: Curve,
    reading: Reading,
    prompt_flops_per_s: float,
) -> Visits:
    """Decode steps of one row, of several as pieces of one visit, of many together; and prompts.

    What attention takes for its bytes is known by now, and is taken off; and so are products, where they
    are not watched.
    """
    with tempfile.TemporaryDirectory(prefix="flexport-profile-", dir=directory) as folder:
        config = write_layers(dtype, Path(folder), effort)
        spec, scale = spec_of(config), config["hidden_size"] / HIDDEN
        step_rows, prompt_rows = max(2, int(STEP_ROWS * scale)), max(1, int(PROMPT_ROWS * scale))
        engine = _Engine(backend, dtype, config, Path(folder), effort)
        one = engine.steps(1, 1, SHORT_PROMPT)
        pieces = engine.steps(1, MANY_PIECES, SHORT_PROMPT)
        steps = engine.steps(step_rows, 1, STEP_PROMPT)
        prompts = engine.prompts(prompt_rows)
    values, tokens = touched_values(spec, 1), prompt_rows * PROMPT_TOKENS
    launches_s, step_products_s, prompt_products_s = _mean(one), 0.0, 0.0
    if not backend.capabilities.addressable:  # it is asynchronous
        launches_s = 0.0
        step_products_s, prompt_products_s = (
            rate_of_products.seconds(of_tokens, engine.layer_values)
            for of_tokens in (step_rows, tokens)
        )
    page_bytes = 2 * config["num_key_value_heads"] * HEAD_DIM * torch_dtype(dtype).itemsize
    queries = config["num_attention_heads"] // config["num_key_value_heads"]
    known = max(each for each in reading.bytes_per_s if each <= queries)
    columns = STEP_PROMPT + effort.decode_steps / 2
    read_s = step_rows * columns * page_bytes / reading.bytes_per_s[known]
    pairs = tokens * (PROMPT_TOKENS + 1) / 2
    scored_s = pairs * attention_flops(spec, 0, 1) / prompt_flops_per_s

    def rate(of_tokens: int, beside: Spread, products_s: float, known_s: float) -> float:
        """Values a second of what is neither launches, nor products, nor attention's bytes."""
        all_s = _mean(beside)
        rest_s = all_s - products_s
        return (
            of_tokens * values / max(rest_s - launches_s - known_s, LEAST * rest_s, NOISE * all_s)
        )

    piece_s = (_mean(pieces) - _mean(one)) / (MANY_PIECES - 1)
    return Visits(
        visit_s=max(0.0, _mean(one) - SHORT_PAGES * reading.page_s),
        piece_s=max(0.0, piece_s - SHORT_PAGES * reading.page_s),
        touched_values_per_s=rate(tokens, prompts, prompt_products_s, scored_s),
        stepped_values_per_s=rate(step_rows, steps, step_products_s, read_s),
        spread=max(each.spread for each in (one, pieces, steps, prompts)),
    )


class _Engine:
    """The engine with a model of few layers; says what a visit of one takes beside its products."""

    def __init__(
        self, backend: Backend, dtype: str, config: dict[str, Any], folder: Path, effort: Effort
    ) -> None:
        """`folder` has the model of this config."""
        self._backend, self._dtype = backend, dtype
        self._folder, self._effort = folder, effort
        layer = layer_tensors(spec_of(config), 1)
        matrices = [tensor for tensor in layer if tensor.kind == "matrix"]
        self._values = [tensor.num_values for tensor in matrices]
        self.layer_values = sum(self._values)

    def steps(self, batch_size: int, num_batches: int, prompt_tokens: int) -> Spread:
        """Of decode steps of so many batches, all passing a layer together; a value each round."""
        rows = batch_size * num_batches
        return self._run(
            batch_size, num_batches, rows, prompt_tokens, self._effort.decode_steps, rows
        )

    def prompts(self, batch_size: int) -> Spread:
        """Of prompts of so many rows at a time."""
        tokens = batch_size * PROMPT_TOKENS
        return self._run(batch_size, 1, PROMPT_BLOCKS * batch_size, PROMPT_TOKENS, 0, tokens)

    def _run(
        self,
        batch_size: int,
        num_batches: int,
        num_rows: int,
        prompt_tokens: int,
        num_steps: int,
        visit_tokens: int,
    ) -> Spread:
        """Of the visits that have so many tokens."""
        most_tokens = max(1024, batch_size * prompt_tokens)
        policy = flexport.Policy(
            batch_size=batch_size,
            num_batches=num_batches,
            prefill_tokens=most_tokens,
            sweep_tokens=most_tokens if num_batches > 1 else 0,
        )
        sampling = flexport.SamplingParams(max_tokens=num_steps + 1, ignore_eos=True)
        watched, found = _Watched(self._backend, self._values), []
        with closing(open_layers(watched, self._dtype, self._folder, policy, self._effort)) as llm:
            for number in range(1 + min(ROUNDS, self._effort.rounds)):
                watched.products.clear()
                llm.generate([[5] * prompt_tokens] * num_rows, sampling)
                if number:  # the first job loads
                    found.append(self._beside(watched, visit_tokens))
        return Spread.of(found)

    def _beside(self, watched: _Watched, tokens: int) -> float:
        """Seconds of a layer's visit, from one layer's first product to the next one's.

        Without products, where these are watched one by one.
        """
        own = [
            each
            for each in watched.products
            if each.tokens == tokens and each.values in self._values
        ]
        products_s = 0.0
        if watched.each:
            largest = [each.taken_s for each in own if each.values == max(self._values)]
            products_s = statistics.fmean(largest) / max(self._values) * self.layer_values
        firsts = [each.started_s for each in own[:: len(self._values)]]
        return statistics.fmean(
            firsts[layer + 1] - firsts[layer] - products_s
            for sweep in range(0, len(firsts), DEPTH)
            for layer in range(sweep, sweep + DEPTH - 1)
        )


def _mean(spread: Spread) -> float:
    """A job meets good moments and bad ones."""
    return max(1e-9, statistics.fmean(spread.values))

"""What a policy is looked for for: a model, a job, a machine, budgets, and what is fixed already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from flexport.planner.costs import Costs
from flexport.planner.footprint import Footprint, JobSizes, ModelSizes, footprint
from flexport.planner.machine import Machine
from flexport.planner.predict import Prediction, predict
from flexport.planner.refusal import room_bytes, within
from flexport.planner.work import ModelWork
from flexport.policy import CACHE_CODECS, Budgets, Policy, Split

__all__ = ["AUTO_WEIGHT_CODECS", "Choice", "Planned", "Task"]

AUTO_WEIGHT_CODECS = ("none", "int8", "int4")
"""Of codecs for weights, those that a search chooses from if it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the caller has fixed; None leaves it to the search."""

    weights: Split | None = None
    cache: Split | None = None
    activations: Split | None = None
    batch_size: int | None = None
    num_batches: int | None = None
    prefill_tokens: int | None = None
    sweep_tokens: int | None = None
    cpu_attention: bool | None = None
    cpu_projections: bool | None = None
    compress_weights: str = "none"
    compress_cache: str = "none"
    """Both change the answers, so a search chooses them only where it is told to: by "auto"."""
    attn_sparsity: float = 1.0
    """Never chosen: it changes the answers, too."""
    max_latency_s: float | None = None
    """The most that `Prediction.block_s` may be."""

    @property
    def weight_codecs(self) -> tuple[str, ...]:
        """What weights may be packed in."""
        auto = self.compress_weights == "auto"
        return AUTO_WEIGHT_CODECS if auto else (self.compress_weights,)

    @property
    def cache_codecs(self) -> tuple[str, ...]:
        """What the cache may be kept in."""
        if self.compress_cache != "auto":
            return (self.compress_cache,)
        # Prompts that several sweeps share have no other: see `Policy`.
        return ("none",) if self.sweep_tokens else CACHE_CODECS


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A policy that fits, and what the job takes under it."""

    policy: Policy
    predicted: Prediction
    tok_s: float
    """Generated tokens a second, loading included where it counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Everything that a search goes by."""

    models: Mapping[str, tuple[ModelSizes, ModelWork]]
    """By codec of the weights; of each that `choice` allows."""
    job: JobSizes
    machine: Machine
    dtype: str
    """What is computed in."""
    budgets: Budgets
    choice: Choice = Choice()
    counts_load: bool = False
    """Whether the weights are loaded for this job only, so that its time includes that."""

    def costs(self, policy: Policy) -> Costs:
        """What the job costs under a policy."""
        sizes, work = self.models[policy.compress_weights]
        return Costs(sizes, work, self.job, policy, self.machine, self.dtype)

    def needs(self, policy: Policy) -> Footprint:
        """What a policy takes."""
        machine = self.machine
        return footprint(
            self.models[policy.compress_weights][0],
            self.job,
            policy,
            machine.page_tokens,
            machine.unified,
            machine.addressable,
        )

    def fits(self, policy: Policy) -> bool:
        """Whether the budgets hold it."""
        return within(self.needs(policy), self.budgets)

    def room_bytes(self, policy: Policy) -> float:
        """Memory near the device for what is fetched ahead: that which is kept free, and what is left."""
        return room_bytes(self.needs(policy), self.budgets)

    def planned(self, policy: Policy, needs: Footprint | None = None) -> Planned:
        """The policy with what the job takes; `needs` are its own, if they are known already."""
        room = room_bytes(needs or self.needs(policy), self.budgets)
        predicted = predict(self.costs(policy), room)
        taken_s = predicted.run_s + (predicted.load_s if self.counts_load else 0.0)
        tok_s = predicted.new_tokens / taken_s if taken_s > 0 else 0.0
        return Planned(policy=policy, predicted=predicted, tok_s=tok_s)

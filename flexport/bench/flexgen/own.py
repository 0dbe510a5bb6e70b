"""What flexport should reach on the same machine: with FlexGen's policy, and with one of its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from flexport.bench.flexgen.published import GEN_LEN, Setting
from flexport.codecs.compressed import compressed
from flexport.engine.model_work import model_work
from flexport.engine.plan import model_sizes
from flexport.engine.rehearsal import rehearse
from flexport.engine.source import Source, open_source
from flexport.planner.costs import Costs
from flexport.planner.footprint import Footprint, JobSizes, ModelSizes, footprint
from flexport.planner.machine import Machine
from flexport.planner.refusal import within
from flexport.planner.search import choose
from flexport.planner.task import Choice, Task
from flexport.policy import Budgets, Policy
from flexport.units import VALUE_BYTES

__all__ = ["Own", "best_policy", "same_policy"]

DTYPE = "float16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Own:
    """A plan of flexport's, and what it should reach."""

    policy: Policy
    tok_s: float
    fits: bool
    """Whether the machine has the memory, by flexport's own count, which keeps a margin."""


def same_policy(setting: Setting, machine: Machine) -> Own:
    """FlexGen's shares and block shape in flexport's schedule, one block as FlexGen ran it."""
    weights, cache, activations = Policy.splits_from_percent(setting.percent)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        batch_size=setting.batch_size,
        num_batches=setting.num_batches,
        cpu_attention=setting.cpu and cache.device < 1,
        compress_weights="int4" if setting.packs_weights else "none",
        compress_cache="int4" if setting.packs_cache else "none",
    )
    costs = _costs(setting, machine, policy, setting.num_rows)
    needs = _needs(costs)
    spare_bytes = max(0, machine.device_bytes - needs.device_bytes)
    rows = [(setting.prompt_len, GEN_LEN)] * setting.batch_size
    rehearsed = rehearse(costs, [rows] * setting.num_batches, needs.staging_bytes[0] + spare_bytes)
    return Own(policy=policy, tok_s=rehearsed.tok_s, fits=within(needs, _budgets(machine)))


def best_policy(setting: Setting, machine: Machine) -> Own:
    """The policy that the planner picks for as many rows as you like, packed where FlexGen packs."""
    choice = Choice(
        compress_weights="int4" if setting.packs_weights else "none",
        compress_cache="int4" if setting.packs_cache else "none",
    )
    codec = choice.compress_weights
    work = model_work(_source(setting.model).spec, codec)
    best = choose(
        Task(
            models={codec: (_sizes(setting.model, codec), work)},
            job=_job(setting, None),
            machine=machine,
            dtype=DTYPE,
            budgets=_budgets(machine),
            choice=choice,
        )
    )
    return Own(policy=best.policy, tok_s=best.tok_s, fits=True)


def _costs(setting: Setting, machine: Machine, policy: Policy, num_rows: int | None) -> Costs:
    codec = policy.compress_weights
    return Costs(
        _sizes(setting.model, codec),
        model_work(_source(setting.model).spec, codec),
        _job(setting, num_rows),
        policy,
        machine,
        DTYPE,
    )


def _needs(costs: Costs) -> Footprint:
    machine = costs.machine
    return footprint(
        costs.model,
        costs.job,
        costs.policy,
        machine.page_tokens,
        machine.unified,
        machine.addressable,
    )


def _job(setting: Setting, num_rows: int | None) -> JobSizes:
    return JobSizes(prompt_tokens=setting.prompt_len, new_tokens=GEN_LEN, num_rows=num_rows)


def _budgets(machine: Machine) -> Budgets:
    return Budgets(
        device_bytes=machine.device_bytes,
        host_bytes=machine.host_bytes,
        disk_bytes=machine.disk_bytes,
    )


@lru_cache(maxsize=8)
def _source(model: str) -> Source:
    return open_source(model, None, "dummy")


@lru_cache(maxsize=8)
def _sizes(model: str, codec: str) -> ModelSizes:
    source, form = _source(model), compressed(codec)
    return model_sizes(
        source.spec, lambda tensor: source.size(tensor, DTYPE, form), VALUE_BYTES[DTYPE]
    )

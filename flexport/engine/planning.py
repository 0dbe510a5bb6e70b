"""Plans of one model: by what a device says of itself, and by what its machine can do.

Neither need be there. A run plans for the device that it has opened; `flexport plan` for one that
nobody opens, or for a machine of which there is only a file. Torch is not imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flexport.backend import Capabilities
from flexport.codecs.compressed import Compressed, compressed
from flexport.engine.compression import weights_summary
from flexport.engine.limits import dtype_for
from flexport.engine.machines import Numbers
from flexport.engine.model_work import model_work
from flexport.engine.plan import Plan, cache_bits, model_sizes
from flexport.engine.source import Source
from flexport.errors import PolicyError, UsageError
from flexport.models.spec import LatentAttention
from flexport.planner.costs import Costs
from flexport.planner.footprint import Footprint, JobSizes, ModelSizes, footprint, page_tokens_for
from flexport.planner.machine import Machine
from flexport.planner.predict import Prediction, predict
from flexport.planner.refusal import check, room_bytes
from flexport.planner.search import choose, need_room
from flexport.planner.task import Choice, Task
from flexport.planner.work import ModelWork
from flexport.policy import Budgets, Policy
from flexport.records import Request
from flexport.units import VALUE_BYTES

__all__ = ["KnownSizes", "Planning", "facts_of", "job_of"]

KnownSizes = dict[tuple[str, str, bool], ModelSizes]
"""By dtype computed in, how weights are compressed, and whether they are ever decoded: half a
second's work where there are 50,000 experts."""

ALWAYS_DIRECT = 1 << 30
"""Tokens of a sweep, more than there are: weights that are multiplied with packed up to so many are
never decoded."""


def job_of(rows: Sequence[Request], num_rows: int | None) -> JobSizes:
    """The lengths of a job that begins with these rows, or of which they were picked.

    `num_rows` is how many there are in all, as far as that is known.
    """
    prompts = [len(request.token_ids) for request in rows]
    new = [request.sampling.max_tokens for request in rows]
    return JobSizes(
        prompt_tokens=max(prompts),
        new_tokens=max(new),
        num_rows=num_rows,
        mean_prompt_tokens=sum(prompts) / len(rows),
        mean_new_tokens=sum(new) / len(rows),
    )


def facts_of(machine: Machine) -> Capabilities:
    """What the device of a machine would say of itself."""
    return Capabilities(
        name=machine.name,
        memory_bytes=machine.device_bytes,
        unified=machine.unified,
        dtypes=machine.dtypes,
        dtype_reason=f"what comes first for {machine.name}",
        page_tokens=machine.page_tokens,
        addressable=machine.addressable,
    )


class Planning:
    """Makes plans, one for each job."""

    def __init__(
        self,
        source: Source,
        facts: Capabilities,
        machine: Machine,
        *,
        numbers: Numbers,
        backend: str,
        dtype: str = "auto",
        decodes: Callable[[Compressed], bool] | None = None,
        sizes: KnownSizes | None = None,
    ) -> None:
        """`facts` decide what fits and what may be asked for, `machine` how long it takes.

        `numbers` says whose the machine's are.
        `decodes` says whether weights that are packed so are ever decoded; without it the machine
        does. `sizes` is what other plans of the model have found out. Raises UsageError for a
        `dtype` that the device doesn't compute in.
        """
        self.machine = machine
        self._numbers = numbers
        self.dtype, self._dtype_reason = dtype_for(dtype, facts, source.file_dtype)
        self._source = source
        self._facts = facts
        self._backend = backend
        self._decodes = decodes or self._is_decoded
        self._sizes_in: KnownSizes = {} if sizes is None else sizes

    def plan(
        self,
        job: JobSizes,
        budgets: Budgets,
        policy: Policy | None = None,
        choice: Choice | None = None,
    ) -> Plan:
        """The plan of `policy`, or else of the best that keeps to `choice`.

        Raises DoesNotFit with the budgets that would do, PolicyError for a policy that this device
        or model can't have.
        """
        choice = choice or Choice()
        preferred, unified = self._facts.page_tokens, self._facts.unified
        policy = policy or choose(self.task(job, budgets, choice)).policy
        if unified and (policy.cpu_attention or policy.cpu_projections):
            raise PolicyError(
                f"--cpu-attention on (a policy's cpu_attention, cpu_projections) is for a device with "
                f"memory of its own; that of {self._facts.name} is the host's, and all is computed "
                "where it lies: leave it out"
            )
        if policy.attn_sparsity < 1 and self._has_latent_attention:
            raise PolicyError(
                f"--attn-sparsity {policy.attn_sparsity:g} (a policy's attn_sparsity): the keys of "
                f"{self._source.name} are its values, too (latent attention), and a step looks at all "
                "keys, so there is nothing that it could leave where it is; leave it out"
            )
        needs = self.footprint(job, policy)
        check(needs, policy, budgets)
        return Plan(
            model=self._source.name,
            backend=self._backend,
            dtype=self.dtype,
            dtype_reason=self._dtype_reason,
            policy=policy,
            job=job,
            needs=needs,
            predicted=self.predict(job, policy, budgets),
            machine=self.machine,
            numbers=self._numbers,
            budgets=budgets,
            page_tokens=page_tokens_for(policy, preferred),
            stream_bytes=round(
                policy.weights.disk * self._sizes(policy.compress_weights).stream_bytes
            ),
            compression={
                "weights": self._weights_summary(policy.compress_weights),
                "cache": {
                    "codec": policy.compress_cache,
                    "bits": cache_bits(
                        self._source.spec, policy.compress_cache, VALUE_BYTES[self.dtype]
                    ),
                },
            },
        )

    def predict(self, job: JobSizes, policy: Policy, budgets: Budgets) -> Prediction:
        """How long the job takes on the machine."""
        room = room_bytes(self.footprint(job, policy), budgets)
        return predict(self.costs(job, policy), room)

    def need_room(
        self, job: JobSizes, budgets: Budgets, policy: Policy | None, choice: Choice
    ) -> None:
        """Raise what `plan` does where there can be none, in a small part of its time."""
        self.plan(job, budgets, policy or need_room(self.task(job, budgets, choice)))

    def task(self, job: JobSizes, budgets: Budgets, choice: Choice | None = None) -> Task:
        """What a policy for the job has to be good at.

        Raises UsageError where the machine's numbers can't be those of the device.
        """
        choice, facts = choice or Choice(), self._facts
        if self._source.packings and choice.compress_weights == "auto":
            choice = replace(choice, compress_weights="none")  # they run as they are
        if self.machine.unified != facts.unified:
            kinds = {True: "the host's", False: "its own"}
            raise UsageError(
                f"the numbers are those of machine {self.machine.name}, whose device's memory is "
                f"{kinds[self.machine.unified]}; that of {facts.name} is {kinds[facts.unified]}"
            )
        return Task(
            models={
                codec: (self._sizes(codec), self._work(codec)) for codec in choice.weight_codecs
            },
            job=job,
            machine=replace(
                self.machine, page_tokens=facts.page_tokens, addressable=facts.addressable
            ),
            dtype=self.dtype,
            budgets=budgets,
            choice=choice,
        )

    def costs(self, job: JobSizes, policy: Policy) -> Costs:
        """What the job's visits take there."""
        codec = policy.compress_weights
        return Costs(self._sizes(codec), self._work(codec), job, policy, self.machine, self.dtype)

    def _work(self, codec: str) -> ModelWork:
        packings = self._source.packings
        return model_work(self._source.spec, codec, packings[0].name if packings else None)

    @property
    def _has_latent_attention(self) -> bool:
        layers = self._source.spec.layers
        return any(isinstance(layer.attention, LatentAttention) for layer in layers)

    def footprint(self, job: JobSizes, policy: Policy) -> Footprint:
        """What the job takes of each tier."""
        facts = self._facts
        return footprint(
            self._sizes(policy.compress_weights),
            job,
            policy,
            facts.page_tokens,
            facts.unified,
            facts.addressable,
        )

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Raise UsageError for a row that the model has no positions for."""
        # The last token that is sampled is never computed, and needs no position.
        most = self._source.spec.max_positions
        if prompt_tokens + new_tokens - 1 > most:
            raise UsageError(
                f"a row of {prompt_tokens} prompt tokens and {new_tokens} new ones is longer than "
                f"the {most} positions of {self._source.name}"
            )

    def _weights_summary(self, codec: str) -> dict[str, object]:
        packings = self._source.packings
        if codec != "none" and packings:
            raise PolicyError(
                f"--compress-weights {codec}: the weights of {self._source.name} are packed already, "
                f"as {packings[0].name}, and run as they are; leave --compress-weights out"
            )
        return weights_summary(self._source.spec, codec)

    def _sizes(self, codec: str) -> ModelSizes:
        dtype, form = self.dtype, compressed(codec)
        decodes = form is not None and self._decodes(form)
        key = (dtype, codec, decodes)
        if key not in self._sizes_in:
            self._sizes_in[key] = model_sizes(
                self._source.spec,
                lambda tensor: self._source.size(tensor, dtype, form, decodes=decodes),
                VALUE_BYTES[dtype],
            )
        return self._sizes_in[key]

    def _is_decoded(self, form: Compressed) -> bool:
        return self.machine.device.direct_rows.get(form.matrix_form, 0) < ALWAYS_DIRECT

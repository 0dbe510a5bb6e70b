"""`flexport.LLM`: the engine as Python users know it from vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from flexport.backend import Backend
from flexport.engine.engine import Engine
from flexport.engine.plan import Plan
from flexport.errors import PolicyError, RowError, UsageError
from flexport.planner.task import Choice
from flexport.policy import CACHE_CODECS, WEIGHT_CODECS, Policy
from flexport.records import CompletionOutput, Request, RequestOutput, SamplingParams
from flexport.tokenizer import Tokenizer
from flexport.units import parse_bytes

if TYPE_CHECKING:
    from flexport.engine.packing import ShowPacking
    from flexport.engine.scoring import Score

__all__ = ["LLM", "policy_asked"]

Prompt = str | Sequence[int]


def policy_asked(
    policy: Literal["auto"] | Policy | str | Path = "auto",
    *,
    percent: Sequence[float] | None = None,
    batch_size: int | None = None,
    num_batches: int | None = None,
    prefill_tokens: int | None = None,
    sweep_tokens: int | None = None,
    cpu_attention: Literal["auto", "on", "off"] = "auto",
    compress_weights: str = "none",
    compress_cache: str = "none",
    attn_sparsity: float = 1.0,
    max_latency: float | None = None,
) -> tuple[Policy | None, Choice]:
    """The policy to obey, if one was given, and what is fixed of one that is yet to be found.

    The options are those of `LLM`. Raises PolicyError and UsageError for what can't be had.
    """
    weights, cache, activations = (
        (None, None, None) if percent is None else Policy.splits_from_percent(percent)
    )
    choice = Choice(
        weights=weights,
        cache=cache,
        activations=activations,
        batch_size=batch_size,
        num_batches=num_batches,
        prefill_tokens=prefill_tokens,
        sweep_tokens=sweep_tokens,
        cpu_attention=_switch("cpu_attention", cpu_attention),
        compress_weights=_codec("compress_weights", compress_weights, (*WEIGHT_CODECS, "auto")),
        compress_cache=_codec("compress_cache", compress_cache, (*CACHE_CODECS, "auto")),
        attn_sparsity=attn_sparsity,
        max_latency_s=_positive("max_latency", max_latency),
    )
    Policy(attn_sparsity=attn_sparsity)  # which refuses what is no such share
    if policy == "auto":
        return None, choice
    if choice != Choice():
        raise PolicyError(
            "a policy and options that change it were both given; change the policy instead"
        )
    return (policy if isinstance(policy, Policy) else Policy.from_file(policy)), choice


class LLM:
    """A model that runs as it fits; a context manager.

    The options are those of `flexport run`. Nothing is loaded before the first job, whose rows'
    lengths decide what fits.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        revision: str | None = None,
        load_format: Literal["auto", "dummy"] = "auto",
        backend: str | Backend = "auto",
        dtype: str = "auto",
        policy: Literal["auto"] | Policy | str | Path = "auto",
        percent: Sequence[float] | None = None,
        batch_size: int | None = None,
        num_batches: int | None = None,
        prefill_tokens: int | None = None,
        sweep_tokens: int | None = None,
        cpu_attention: Literal["auto", "on", "off"] = "auto",
        compress_weights: str = "none",
        compress_cache: Literal["none", "int8", "int4", "auto"] = "none",
        attn_sparsity: float = 1.0,
        max_latency: float | None = None,
        device_memory: int | str | None = None,
        host_memory: int | str | None = None,
        disk_memory: int | str | None = None,
        offload_dir: str | Path | None = None,
        seed: int = 0,
        on_plan: Callable[[Plan], None] | None = None,
        trace: str | Path | None = None,
        show_packing: ShowPacking | None = None,
    ) -> None:
        """Sizes are bytes or text such as "14GiB"; without `model` it is the embedded demo.

        `backend` is a registered name, or an open backend, which stays the caller's to close.

        `compress_weights` is one of `flexport.policy.WEIGHT_CODECS`, `compress_cache` one of
        `CACHE_CODECS`; or "auto", which lets the search for a policy compress where that is faster.
        `attn_sparsity` is the share of the tokens whose values decode steps add up, 1 for all of them.
        `max_latency` is the most seconds that may be predicted from a block's first prompt to its
        last token.

        `on_plan` is called with each plan before anything of it is done, `show_packing` when weights
        are packed or checked, which may take minutes; `trace` is a file for
        what every lane does when, in the Chrome trace format. Raises UsageError, or
        one of the errors below it, for what can't work.
        """
        obeyed, choice = policy_asked(
            policy,
            percent=percent,
            batch_size=batch_size,
            num_batches=num_batches,
            prefill_tokens=prefill_tokens,
            sweep_tokens=sweep_tokens,
            cpu_attention=cpu_attention,
            compress_weights=compress_weights,
            compress_cache=compress_cache,
            attn_sparsity=attn_sparsity,
            max_latency=max_latency,
        )
        self.engine = Engine(
            model=None if model is None else str(model),
            revision=revision,
            load_format=load_format,
            backend=backend,
            dtype=dtype,
            policy=obeyed,
            choice=choice,
            budgets=(_bytes(device_memory), _bytes(host_memory), _bytes(disk_memory)),
            offload_dir=None if offload_dir is None else Path(offload_dir),
            seed=seed,
            on_plan=on_plan,
            trace=None if trace is None else Path(trace),
            show_packing=show_packing,
        )

    @property
    def plan(self) -> Plan | None:
        """The plan in force; None before the first job."""
        return self.engine.plan

    @property
    def report(self) -> dict[str, Any]:
        """The last job's report; empty before the first one has ended."""
        return self.engine.report

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, if it came with one."""
        return self.engine.tokenizer

    @property
    def model_name(self) -> str:
        """The model as it was asked for."""
        return self.engine.model_name

    @property
    def max_positions(self) -> int:
        """Tokens that a row may have, prompt and continuation together."""
        return self.engine.spec.max_positions

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return self.engine.spec.vocab_size

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """One output for each prompt (text or token ids), in the prompts' order."""
        listed = _as_list(prompts)
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(listed)
        else:
            params = list(sampling_params)
        if len(params) != len(listed):
            raise UsageError(f"{len(listed)} prompts were given, and {len(params)} sampling_params")
        return self._generate(
            [
                self._request(index, prompt, sampling)
                for index, (prompt, sampling) in enumerate(zip(listed, params, strict=True))
            ]
        )

    def chat(
        self,
        conversations: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | None = None,
    ) -> list[RequestOutput]:
        """One answer for each conversation, through the model's chat template."""
        many = (
            [conversations]
            if conversations and isinstance(conversations[0], Mapping)
            else conversations
        )
        tokenizer = self._need_tokenizer()
        prompts = [tokenizer.apply_chat_template(messages) for messages in many]  # type: ignore[arg-type]
        return self.generate(prompts, sampling_params)

    def score(
        self, pairs: Sequence[tuple[Prompt, Prompt]], *, through_cache: bool = False
    ) -> list[Score]:
        """The log-likelihood of each continuation after its context.

        An empty context is the model's beginning-of-text token. A `Score` is a float that also
        has `is_greedy`, `token_log_probs` and `best_token_ids`.

        A continuation is computed together with its context, which is quick. With through_cache it
        goes token by token, as if it were generated, so that what the cache makes of keys and
        values shows; in an exact cache both give the same, but for rounding and for models whose
        angles depend on how long a prompt is.
        """
        listed = [self._pair(context, target) for context, target in pairs]
        scores = dict(self.engine.score(listed, through_cache=through_cache))
        return [scores[index] for index in range(len(listed))]

    def close(self) -> None:
        """Give everything back."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        outputs: dict[str, RequestOutput] = {}
        for completion in self.engine.generate(requests):
            request = completion.request
            outputs[request.request_id] = RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=list(request.token_ids),
                outputs=[
                    CompletionOutput(
                        index=0,
                        text=completion.text,
                        token_ids=list(completion.token_ids),
                        finish_reason=completion.finish_reason,
                    )
                ],
            )
        return [outputs[request.request_id] for request in requests]

    def _request(self, index: int, prompt: Prompt, sampling: SamplingParams) -> Request:
        ids = self._need_tokenizer().encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise RowError(
                "empty_prompt", f"prompt {index} has no tokens; there is nothing to continue"
            )
        if len(ids) + sampling.max_tokens > self.max_positions + 1:
            raise RowError(
                "context_length_exceeded",
                f"prompt {index} has {len(ids)} tokens and asks for {sampling.max_tokens} more; "
                f"{self.model_name} has {self.max_positions} positions",
            )
        outside = [token for token in ids if not 0 <= token < self.vocab_size]
        if outside:
            raise RowError(
                "invalid_token", f"prompt {index} has token {outside[0]}, of {self.vocab_size}"
            )
        if sampling.stop:
            self._need_tokenizer()
        return Request(
            request_id=str(index),
            token_ids=tuple(ids),
            sampling=sampling,
            prompt=prompt if isinstance(prompt, str) else None,
        )

    def _pair(self, context: Prompt, target: Prompt) -> tuple[list[int], list[int]]:
        if isinstance(context, str):
            context_ids = self._need_tokenizer().encode(context)
        else:
            context_ids = list(context)
        if isinstance(target, str):
            target_ids = self._need_tokenizer().encode_continuation(target)
        else:
            target_ids = list(target)
        if not context_ids and self.engine.spec.bos_token_id is not None:
            context_ids = [self.engine.spec.bos_token_id]
        if not context_ids or not target_ids:
            raise UsageError("score takes pairs of a context and a continuation, neither empty")
        return context_ids, target_ids

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise UsageError(
                f"{self.model_name} came without a tokenizer; give prompts as token ids, and no "
                "stop strings"
            )
        return self.tokenizer


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    listed = list(prompts)
    if listed and all(isinstance(item, int) for item in listed):
        return [listed]  # type: ignore[list-item]
    return listed  # type: ignore[return-value]  # the check above ruled single ids out


def _bytes(size: int | str | None) -> int | None:
    if isinstance(size, str):
        try:
            return parse_bytes(size)
        except ValueError as error:
            raise UsageError(str(error)) from error
    return size


def _switch(name: str, value: str) -> bool | None:
    """Whether "on" or "off" was asked for; None leaves it to the planner."""
    if value not in ("auto", "on", "off"):
        raise UsageError(f"{name} is 'auto', 'on' or 'off', got {value!r}")
    return None if value == "auto" else value == "on"


def _positive(option: str, number: float | None) -> float | None:
    if number is not None and not number > 0:
        raise UsageError(f"{option} is a number of seconds > 0, got {number!r}")
    return number


def _codec(option: str, name: str, codecs: Sequence[str]) -> str:
    if name not in codecs:
        raise UsageError(f"{option} is one of {', '.join(codecs)}, got {name!r}")
    return name

"""What codecs do to a model's answers: perplexity, and how often the next token stays the same.

The same text is scored with each pair of codecs, token by token through the cache
(`LLM.score(through_cache=True)`), so that all tokens but a window's first ones are predicted as
generation would, from packed weights and from what the cache has kept. Perplexity is
exp(-mean natural logarithm of each token's probability). No torch is imported here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from flexport import demo
from flexport.apps.batch import Generator, Progress
from flexport.apps.demo import mark
from flexport.errors import RunError, UsageError
from flexport.models.spec import ModelSpec
from flexport.models.tensors import num_parameters
from flexport.policy import CACHE_CODECS, WEIGHT_CODECS
from flexport.tokenizer import Tokenizer
from flexport.units import VALUE_BYTES

if TYPE_CHECKING:
    from flexport.engine.scoring import Score

__all__ = [
    "EXACT",
    "Codecs",
    "Compared",
    "Figures",
    "Measured",
    "Pair",
    "TestedModel",
    "compare",
    "cut",
    "figures",
    "measure",
    "text_prefix",
    "windows",
]

Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens that are only looked back at, and the tokens after them, which are scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codecs:
    """What weights and KV cache are packed as, and what share of values decode steps add up."""

    weights: str = "none"
    cache: str = "none"
    attn_sparsity: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Codecs:
        """The pair of "int4,none". Raises ValueError."""
        weights, _, cache = text.partition(",")
        if weights not in WEIGHT_CODECS or cache not in CACHE_CODECS:
            raise ValueError(
                f"{text!r} is not a pair of codecs; write WEIGHTS,CACHE, e.g. int4,none: weights are "
                f"{', '.join(WEIGHT_CODECS)}, and the KV cache {', '.join(CACHE_CODECS)}"
            )
        return cls(weights=weights, cache=cache)

    def __str__(self) -> str:
        values = f", {self.attn_sparsity:g} of the values" if self.attn_sparsity < 1 else ""
        return f"{self.weights},{self.cache}{values}"

    def settings(self) -> dict[str, Any]:
        """Keyword arguments of `flexport.LLM`, and fields of a policy; what is exact left out."""
        asked = {"compress_weights": self.weights, "compress_cache": self.cache}
        settings: dict[str, Any] = {name: to for name, to in asked.items() if to != "none"}
        return settings | ({"attn_sparsity": self.attn_sparsity} if self.attn_sparsity < 1 else {})


EXACT = Codecs()
"""What all others are compared with."""


class _Engine(Generator, Protocol):
    @property
    def spec(self) -> ModelSpec: ...

    def score(
        self, pairs: Sequence[Pair], *, through_cache: bool
    ) -> Iterator[tuple[int, Score]]: ...


class TestedModel(Protocol):
    """What is measured: `flexport.LLM`, or in tests something that looks like one."""

    @property
    def engine(self) -> _Engine:
        """Whoever gives scores, and completions, as rows end."""

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's, if it has one."""

    @property
    def report(self) -> dict[str, Any]:
        """The last job's."""


class TextTokenizer(Protocol):
    """What it takes to tell which tokens a model wants before every text."""

    def encode(self, text: str) -> list[int]:
        """Token ids with the special tokens that the model wants around the text."""

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of the text alone."""


# ---- text


def text_prefix(tokenizer: TextTokenizer) -> tuple[int, ...]:
    """The special tokens before every text; () where the model wants none."""
    whole, plain = tokenizer.encode("a"), tokenizer.encode_continuation("a")
    for begin in range(len(whole) - len(plain) + 1):
        if whole[begin : begin + len(plain)] == plain:
            return tuple(whole[:begin])
    return ()


def windows(
    ids: Sequence[int], *, prefix: Sequence[int], window: int, stride: int
) -> Iterator[Pair]:
    """Cut a text into windows of at most `window` tokens, each scoring the next `stride` ones.

    What a window has before these is its context: `prefix`, and as many of the text's tokens as
    there is room for. So each token is scored once, and those far enough from the beginning are
    predicted from at least window - stride tokens. The very first one is not, if there is no prefix
    that it could be predicted from.
    """
    room = window - stride - len(prefix)
    if stride < 1 or room < 0 or not (room or prefix):
        raise UsageError(
            f"a window of {window} tokens that scores {stride} of them has no room for a context; "
            "ask for a --stride of at least 1 and below --window, half of it for instance"
        )
    for begin in range(0 if prefix else 1, len(ids), stride):
        context = (*prefix, *ids[max(0, begin - room) : begin])
        yield context, tuple(ids[begin : begin + stride])


def cut(pairs: Sequence[Pair], max_tokens: int) -> list[Pair]:
    """The first pairs, so that at most max_tokens tokens are scored."""
    kept, left = [], max_tokens
    for context, target in pairs:
        if left <= 0:
            break
        kept.append((context, target[:left]))
        left -= len(target)
    return kept


# ---- measuring


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a model with some codecs made of all windows' tokens, one after the other."""

    codecs: Codecs
    log_probs: tuple[float, ...]
    best_ids: tuple[int, ...]
    """The most likely token in each place."""
    weight_bits: float
    """Of a weight, scales included."""
    cache_bits: float
    """Of a key's or a value's number, scales included."""
    report: Mapping[str, Any] = field(repr=False)

    @property
    def tok_s(self) -> float:
        """Tokens scored per second of prefill and decode."""
        seconds = self.report["seconds"]
        busy_s = seconds["prefill"] + seconds["decode"]
        return len(self.log_probs) / busy_s if busy_s else 0.0


def measure(
    model: TestedModel, codecs: Codecs, pairs: Sequence[Pair], progress: Progress
) -> Measured:
    """Score all pairs. Raises RunError if a probability is not a number."""
    scores: dict[int, Score] = {}
    for index, score in model.engine.score(pairs, through_cache=True):
        scores[index] = score
        progress.answered(len(score.token_log_probs))
    ordered = [scores[index] for index in range(len(pairs))]
    log_probs = tuple(log_prob for score in ordered for log_prob in score.token_log_probs)
    num_bad = sum(not math.isfinite(log_prob) for log_prob in log_probs)
    if num_bad:
        raise RunError(
            f"with the codecs {codecs}, {num_bad} of {len(log_probs)} tokens have no finite "
            "log-probability; if the model was computed in float16 its activations overflowed: use "
            "--dtype bfloat16 or float32"
        )
    report = model.report
    return Measured(
        codecs=codecs,
        log_probs=log_probs,
        best_ids=tuple(token_id for score in ordered for token_id in score.best_token_ids),
        weight_bits=_weight_bits(report, model.engine.spec),
        cache_bits=_packed_bits(report, "cache") or 8.0 * VALUE_BYTES[report["dtype"]],
        report=report,
    )


def _weight_bits(report: Mapping[str, Any], spec: ModelSpec) -> float:
    """As the report says of packed ones, else what all weights take where they are at home."""
    placed_bytes = sum(tier["bytes"] for tier in report["placement"]["weights"].values())
    return _packed_bits(report, "weights") or 8.0 * placed_bytes / num_parameters(spec)


def _packed_bits(report: Mapping[str, Any], kind: str) -> float | None:
    """The bits that a report tells of a codec, if there is one."""
    told: float | None = report.get("compression", {}).get(kind, {}).get("bits")
    return told


# ---- comparing


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """How well some codecs do beside none."""

    perplexity: float
    ratio: float
    """The perplexity divided by the uncompressed one."""
    ratio_error: float
    """The standard error of the ratio: another text as long would give another one by about this."""
    same_token: float
    """Share of places where the most likely token is the uncompressed model's."""
    right_token: float
    """Share of places where the most likely token is the text's own."""


def figures(found: Measured, exact: Measured, pairs: Sequence[Pair]) -> Figures:
    """Compare what was made of the same pairs."""
    targets = [token_id for _, target in pairs for token_id in target]
    losses = [
        before - after for before, after in zip(exact.log_probs, found.log_probs, strict=True)
    ]
    ratio = _exp(statistics.fmean(losses))
    # Of e to the power of a mean: the mean's own standard error, times the derivative.
    spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
    return Figures(
        perplexity=_exp(-statistics.fmean(found.log_probs)),
        ratio=ratio,
        ratio_error=ratio * spread / math.sqrt(len(losses)),
        same_token=_share_equal(found.best_ids, exact.best_ids),
        right_token=_share_equal(found.best_ids, targets),
    )


def _share_equal(some: Sequence[int], others: Sequence[int]) -> float:
    return statistics.fmean(one == other for one, other in zip(some, others, strict=True))


def _exp(power: float) -> float:
    """e to a power; inf where no float is so large."""
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One pair of codecs beside none."""

    measured: Measured
    figures: Figures
    demo: demo.Accuracy | None
    """How many of the demo job's rows are answered exactly, if that was asked."""


def compare(
    open_model: Callable[[Codecs], AbstractContextManager[TestedModel]],
    codecs: Iterable[Codecs],
    pairs: Sequence[Pair],
    progress: Progress,
    *,
    with_demo: bool,
) -> Iterator[Compared]:
    """Open a model with no codecs, measure it and close it, and then one with each of `codecs`."""
    exact: Measured | None = None
    for asked in dict.fromkeys((EXACT, *codecs)):
        with open_model(asked) as model:
            found = measure(model, asked, pairs, progress)
            marks = mark(model.engine, model.tokenizer, progress) if with_demo else None
        exact = exact or found
        yield Compared(measured=found, figures=figures(found, exact, pairs), demo=marks)

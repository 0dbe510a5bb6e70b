"""Decode steps that add up few values: which ones is a row's own matter, wherever its cache lives.

What is computed is compared with transformers, whose attention is replaced, logit by logit. Of two
columns whose weights differ by less than rounding either may be chosen, by the reference too: the
models are seeded, and have no such pair that would show.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_card import FakeCard
from fake_mps_runtime import FakeRuntime
from flexport_cuda.backend import CudaBackend
from flexport_emulated.backend import EmulatedBackend
from flexport_mps.backend import MpsBackend
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sparse_reference import logits_of
from tier_mixes import AMPLE, any_mix, block_of
from torch import Tensor
from torch.utils import backend_registration
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import flexport
from flexport import Policy, SamplingParams
from flexport.engine.cache import BatchCache, Held
from flexport.engine.generation import Generation
from flexport.errors import PolicyError
from flexport.testing.discrete import DiscreteBackend
from flexport.torch_ops.attention import forget

MEMORY_BYTES = 1 << 30
BITS = {"none": 0, "int8": 8, "int4": 4}
PROMPT_LENGTHS = (1, 2, 17, 40, 64, 70, 100)
VOCABULARY = 97

needs_python_devices = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)


@dataclass(frozen=True)
class Reference:
    """A checkpoint, the model that transformers makes of it, and some prompts."""

    directory: Path
    model: Any
    prompts: list[list[int]]


def _sizes(**fields: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        **fields,
    }


def _ministral(layer_types: str, window: int, **fields: Any) -> Any:
    names = {"f": "full_attention", "s": "sliding_attention"}
    return MinistralForCausalLM(
        MinistralConfig(
            **_sizes(
                intermediate_size=48,
                sliding_window=window,
                layer_types=[names[letter] for letter in layer_types],
                **fields,
            )
        )
    )


MODELS: dict[str, Callable[[], Any]] = {
    "heads of 16": lambda: OPTForCausalLM(
        OPTConfig(**_sizes(hidden_size=64, ffn_dim=64, word_embed_proj_dim=64))
    ),
    "grouped heads, windows of 24": lambda: _ministral(
        "fsf", 24, num_key_value_heads=2, head_dim=64
    ),
    "heads of 10, windows of 50": lambda: _ministral("ssf", 50, num_key_value_heads=1, head_dim=10),
    "sinks, experts, windows of 1": lambda: GptOssForCausalLM(
        GptOssConfig(
            **_sizes(
                num_key_value_heads=2,
                head_dim=12,
                intermediate_size=48,
                num_local_experts=4,
                num_experts_per_tok=2,
                sliding_window=1,
                layer_types=["full_attention", "sliding_attention", "full_attention"],
            )
        )
    ),
    "one head of 4096": lambda: _ministral(
        "ff", 500, num_hidden_layers=2, num_key_value_heads=1, head_dim=4096
    ),
    "latent": lambda: DeepseekV2ForCausalLM(
        DeepseekV2Config(
            **_sizes(
                num_key_value_heads=4,
                intermediate_size=48,
                moe_intermediate_size=20,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_shared_experts=1,
                first_k_dense_replace=1,
                q_lora_rank=20,
                kv_lora_rank=58,
                qk_nope_head_dim=10,
                qk_rope_head_dim=6,
                v_head_dim=12,
            )
        )
    ),
}

SMALL = list(MODELS)[:4]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Reference]:
    """reference(name of a model): made when first asked for."""
    made: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in made:
            made[name] = _make(MODELS[name], tmp_path_factory.mktemp("sparse"))
        return made[name]

    return get


def _make(build: Callable[[], Any], directory: Path) -> Reference:
    torch.manual_seed(0)
    model = build().eval()
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.2 + (parameter == 1))
    model.save_pretrained(directory)
    draw = random.Random(7)
    prompts = [[draw.randrange(3, VOCABULARY) for _ in range(size)] for size in PROMPT_LENGTHS]
    return Reference(directory, model, prompts)


# ---- the logits


@dataclass(frozen=True)
class Case:
    """One way to run one job."""

    model: str
    share: float
    codec: str
    percent: list[int]
    shape: dict[str, Any]
    beside: bool
    slack: float
    rows: list[int]
    lengths: list[int]


_UNIT = st.integers(0, 100)
_PAIR = st.one_of(
    st.sampled_from([(100, 0), (0, 100), (0, 0), (50, 0)]),
    st.tuples(_UNIT, _UNIT).map(lambda pair: (pair[0], min(pair[1], 100 - pair[0]))),
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_rows = draw(st.integers(1, 4))
    rows = st.integers(0, len(PROMPT_LENGTHS) - 1)
    codec = draw(st.sampled_from(["none", "none", "none", "int8", "int4"]))
    # Packed ones have to fill a group; of others a few pages will do.
    most = 24 if codec == "none" else 70
    lengths = st.one_of(st.integers(1, most), st.just(most))
    return Case(
        model=draw(st.sampled_from(SMALL)),
        share=draw(st.sampled_from([0.03, 0.1, 0.3, 0.8])),
        codec=codec,
        percent=[*draw(_PAIR), *draw(_PAIR), *draw(_PAIR)],
        shape={
            "batch_size": draw(st.integers(1, 4)),
            "num_batches": draw(st.integers(1, 3)),
            "prefill_tokens": draw(st.sampled_from([7, 50, 150, 2048])),
            "sweep_tokens": draw(st.sampled_from([0, 0, 20])) if codec == "none" else 0,
        },
        beside=draw(st.booleans()),
        slack=draw(st.sampled_from([1.0, 1.0, 1.1, 20.0])),
        rows=draw(st.lists(rows, min_size=num_rows, max_size=num_rows)),
        lengths=draw(st.lists(lengths, min_size=num_rows, max_size=num_rows)),
    )


def options_of(case: Case, backend: Any, found: Reference, offload_dir: Path) -> dict[str, Any]:
    weights, cache, activations = Policy.splits_from_percent(case.percent)
    policy = Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        cpu_attention=case.beside and backend != "cpu",
        compress_cache=case.codec,
        attn_sparsity=case.share,
        **case.shape,
    )
    return {
        "model": found.directory,
        "backend": backend,
        "dtype": "float32",
        "policy": policy,
        "offload_dir": offload_dir,
    }


def budgets_of(
    case: Case, backend: Any, found: Reference, plan_for: Any, offload_dir: Path
) -> dict[str, int]:
    """What the plan says that it needs, times the slack."""
    prompts = [found.prompts[row] for row in case.rows]
    options = options_of(case, backend, found, offload_dir)
    needs = plan_for(prompts, case.lengths, **options, **AMPLE).needs
    return {
        "device_memory": int(needs.device_bytes * case.slack),
        "host_memory": int(needs.host_bytes * case.slack),
        "disk_memory": int(needs.disk_bytes * case.slack),
    }


@contextlib.contextmanager
def recorded() -> Iterator[dict[str, list[Tensor]]]:
    """The logits that each request's tokens are chosen from, step by step."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    take = Generation.take

    def watched(self: Generation, rows: Any, logits_WV: Tensor) -> None:
        on_host_WV = logits_WV.cpu().clone()
        for (row, _), logits_V in zip(rows, on_host_WV, strict=True):
            seen[row.key.request.request_id].append(logits_V)
        take(self, rows, logits_WV)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generation, "take", watched)
        yield seen


def generated(
    prompts: list[list[int]], lengths: list[int], **options: Any
) -> tuple[list[list[int]], list[Tensor], dict[str, Any]]:
    """The tokens of each row, the logits that they were chosen from, and the report."""
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    with recorded() as seen, flexport.LLM(**options) as llm:
        outputs = llm.generate(prompts, params)
        report = llm.report
    ids = [output.outputs[0].token_ids for output in outputs]
    return ids, [torch.stack(seen[str(row)]) for row in range(len(prompts))], report


TOLERANCE = {"none": 1e-4, "int8": 0.002, "int4": 0.01}
"""Of logits, root mean square by their spread; of packed caches as in test_packed_cache. Another choice
of columns shows as 0.01 and more."""


def differ(logits: Tensor, others: Tensor) -> float:
    """How far logits are apart, as a root mean square, by their spread."""
    return float((logits - others).square().mean().sqrt() / logits.std())


def check(
    case: Case, backend: Any, found: Reference, budgets: dict[str, int], offload_dir: Path
) -> None:
    prompts = [found.prompts[row] for row in case.rows]
    options: dict[str, Any] = {**options_of(case, backend, found, offload_dir), **budgets}

    ids, logits, report = generated(prompts, case.lengths, **options)

    for prompt, own_ids, own_logits in zip(prompts, ids, logits, strict=True):
        expected = logits_of(found.model, prompt, own_ids, case.share, BITS[case.codec])
        assert differ(own_logits, expected) < TOLERANCE[case.codec]
    # Nor was it right only because a block that found no room was halved.
    assert report["retries"] == []
    peak_bytes = report["peak_bytes"]
    assert all(peak_bytes[tier] <= budgets[f"{tier}_memory"] for tier in ("device", "host", "disk"))


_settings = settings(
    max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "8")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@_settings
@given(case=cases())
def test_logits_are_those_of_few_values_for_any_policy_where_memory_is_one_pool(
    case, reference, plan_for, nothing_left
):
    found = reference(case.model)
    budgets = budgets_of(case, "cpu", found, plan_for, nothing_left)

    check(case, "cpu", found, budgets, nothing_left)


@_settings
@given(case=cases(), late=st.booleans())
def test_logits_are_those_of_few_values_for_any_policy_on_a_device_with_its_own_memory(
    case, late, reference, plan_for, nothing_left
):
    found = reference(case.model)
    with contextlib.closing(DiscreteBackend(memory_bytes=MEMORY_BYTES, late=late)) as backend:
        budgets = budgets_of(case, backend, found, plan_for, nothing_left)

        check(case, backend, found, budgets, nothing_left)


@needs_python_devices
@settings(_settings, max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "4")))
@given(case=cases(), unified=st.booleans())
def test_a_device_that_has_what_the_plan_needs_to_the_byte_is_large_enough(
    case, unified, reference, plan_for, nothing_left
):
    """Every byte that is alive on it counts, also of what choosing takes."""
    found = reference(case.model)
    tight = replace(case, slack=1.0, beside=case.beside and not unified)
    with contextlib.closing(EmulatedBackend(unified=unified)) as ample:
        budgets = budgets_of(tight, ample, found, plan_for, nothing_left)

    small = EmulatedBackend(memory_bytes=budgets["device_memory"], unified=unified)
    with contextlib.closing(small) as device:
        check(tight, device, found, budgets, nothing_left)
        assert 0 < device.peak_bytes <= budgets["device_memory"]


# ---- the same tokens everywhere


LENGTHS = [14, 3, 40, 14, 1, 7, 30]
"""Rows end at different steps, so that caches shrink."""

MIXED = ["heads of 16", "grouped heads, windows of 24"]


@pytest.fixture(scope="module")
def in_memory(reference: Callable[[str], Reference]) -> dict[str, list[list[int]]]:
    """What rows whose cache is where it is computed with are continued by, by model."""
    return {
        name: generated(
            reference(name).prompts,
            LENGTHS,
            model=reference(name).directory,
            dtype="float32",
            attn_sparsity=0.2,
            **AMPLE,
        )[0]
        for name in MIXED
    }


def on(device: Any, number: int, percent: list[int], reference: Any, offload_dir: Path) -> Any:
    """The tokens of one mix of tiers on a device."""
    found = reference(MIXED[number % 2])
    ids, _, report = generated(
        found.prompts,
        LENGTHS,
        model=found.directory,
        backend=device,
        dtype="float32",
        percent=percent,
        attn_sparsity=0.2,
        cpu_attention="off",
        offload_dir=offload_dir,
        **block_of(number),
        **AMPLE,
    )
    counts = report["sparse_attention"]
    assert (counts["value_bytes_whole"] > 0) == (percent[2] + percent[3] * device.shares < 100)
    return ids


class _Discrete(EmulatedBackend):
    shares = False
    """Whether host memory is the device's, too."""


class _Unified(EmulatedBackend):
    shares = True

    def __init__(self) -> None:
        super().__init__(unified=True)


@needs_python_devices
@pytest.mark.parametrize("make", [_Discrete, _Unified], ids=["discrete", "unified"])
@any_mix
def test_tokens_are_the_same_for_any_mix_of_tiers_on_an_accelerator(
    number, percent, make, reference, in_memory, nothing_left
):
    with contextlib.closing(make()) as device:
        ids = on(device, number, percent, reference, nothing_left)
        gc.collect()
        left_bytes = device.used_bytes

    assert ids == in_memory[MIXED[number % 2]]
    assert left_bytes == 0


class _Card(CudaBackend):
    shares = False


@any_mix
def test_tokens_are_the_same_for_any_mix_of_tiers_on_a_card_of_threads(
    number, percent, reference, in_memory, nothing_left
):
    fake_card = FakeCard()

    with contextlib.closing(_Card(fake_card)) as device:
        ids = on(device, number, percent, reference, nothing_left)
        device.sync()
        forget()
        gc.collect()
        left_bytes = fake_card.arena_used_bytes

    assert ids == in_memory[MIXED[number % 2]]
    assert left_bytes == 0


class _Mps(MpsBackend):
    shares = True


@needs_python_devices
@any_mix
def test_tokens_are_the_same_for_any_mix_of_tiers_on_a_fake_of_mps(
    number, percent, reference, in_memory, nothing_left
):
    runtime = FakeRuntime()

    with contextlib.closing(runtime), contextlib.closing(_Mps(runtime)) as device:
        ids = on(device, number, percent, reference, nothing_left)

    assert ids == in_memory[MIXED[number % 2]]


@needs_python_devices
@pytest.mark.parametrize("home", ["host", "disk"])
def test_rows_that_have_ended_leave_pages_whose_values_stayed_at_home(
    home, reference, in_memory, nothing_left, monkeypatch
):
    """To be rewritten without them, such a page comes whole."""
    found, shrunk = reference("heads of 16"), []
    shrink = BatchCache._shrink

    def watched(self: BatchCache, held: Held, alive: set[int], stop: int) -> None:
        shrunk.append(len(held.far))
        shrink(self, held, alive, stop)

    monkeypatch.setattr(BatchCache, "_shrink", watched)
    with contextlib.closing(EmulatedBackend()) as device:
        ids, _, _ = generated(
            found.prompts,
            LENGTHS,
            model=found.directory,
            backend=device,
            dtype="float32",
            percent=[100, 0, 0, 100 * (home == "host"), 100, 0],
            attn_sparsity=0.2,
            cpu_attention="off",
            batch_size=7,
            offload_dir=nothing_left,
            **AMPLE,
        )

    assert ids == in_memory["heads of 16"]
    assert max(shrunk) > 0


# ---- bytes


def moved(
    found: Reference, share: float, percent: list[int], backend: Any, offload_dir: Path
) -> dict[str, Any]:
    """The report of two rows of 64 tokens that go on for 30, with one head of 16 KiB values."""
    _, _, report = generated(
        [[5 + row] * 64 for row in range(2)],
        [30] * 2,
        model=found.directory,
        backend=backend,
        dtype="float32",
        percent=percent,
        cpu_attention="off",
        attn_sparsity=share,
        batch_size=2,
        offload_dir=offload_dir,
        **AMPLE,
    )
    return report


@needs_python_devices
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_only_chosen_values_cross_the_link(share, reference, nothing_left):
    found, on_host = reference("one head of 4096"), [100, 0, 0, 100, 100, 0]
    with contextlib.closing(EmulatedBackend()) as device:
        whole, few = (moved(found, each, on_host, device, nothing_left) for each in (1.0, share))

    counts = few["sparse_attention"]
    spared_bytes = whole["moved_bytes"]["host_to_device"] - few["moved_bytes"]["host_to_device"]
    assert spared_bytes == counts["value_bytes_saved"]
    # Of the newest page, which comes whole, there are chosen ones too.
    assert 0 < counts["value_bytes_moved"] < 1.2 * share * counts["value_bytes_whole"]
    assert whole["sparse_attention"] == {}


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_only_chosen_values_are_read_from_disk(share, reference, nothing_left):
    found, on_disk = reference("one head of 4096"), [100, 0, 0, 0, 100, 0]

    whole, few = (moved(found, each, on_disk, "cpu", nothing_left) for each in (1.0, share))

    counts = few["sparse_attention"]
    spared_bytes = whole["moved_bytes"]["disk_to_host"] - few["moved_bytes"]["disk_to_host"]
    assert spared_bytes == counts["value_bytes_saved"]
    # A single column between two chosen ones is read with them.
    most = {0.1: 0.15, 0.5: 0.85}[share]
    assert 0 < counts["value_bytes_moved"] < most * counts["value_bytes_whole"]


@needs_python_devices
def test_where_there_is_nothing_to_spare_nothing_is_counted(reference, nothing_left):
    found = reference("one head of 4096")
    with contextlib.closing(EmulatedBackend()) as device:
        report = moved(found, 0.1, [100, 0, 100, 0, 100, 0], device, nothing_left)

    assert set(report["sparse_attention"].values()) == {0}


def test_where_values_stay_rows_have_more_room(reference, plan_for):
    """Of two visits' pages on their way, the values are left out."""
    found = reference("one head of 4096")
    with contextlib.closing(DiscreteBackend(memory_bytes=MEMORY_BYTES)) as backend:
        whole, few = (
            plan_for(
                [[5] * 400] * 8,
                [60] * 8,
                model=found.directory,
                backend=backend,
                dtype="float32",
                percent=[100, 0, 0, 100, 100, 0],
                batch_size=4,
                num_batches=2,
                cpu_attention="off",
                attn_sparsity=share,
                **AMPLE,
            )
            for share in (1.0, 0.1)
        )

    assert few.needs.staging_bytes[0] < 0.7 * whole.needs.staging_bytes[0]
    assert few.needs.device_bytes < whole.needs.device_bytes
    assert "add up the values of 10 % of the tokens" in few.describe()
    assert "add up the values" not in whole.describe()


# ---- what stays, and what is refused


def test_a_share_of_one_is_full_attention_to_the_bit(reference, nothing_left):
    found = reference("heads of 16")
    options: dict[str, Any] = {
        "model": found.directory,
        "dtype": "float32",
        "percent": [100, 0, 40, 0, 100, 0],
        "offload_dir": nothing_left,
        **AMPLE,
    }

    (ids, logits, _), (own_ids, own_logits, _) = (
        generated(found.prompts, LENGTHS, **options, **own) for own in ({}, {"attn_sparsity": 1.0})
    )

    assert own_ids == ids
    assert all(torch.equal(a, b) for a, b in zip(own_logits, logits, strict=True))


def test_scores_through_the_cache_are_those_of_few_values_and_others_are_exact(reference):
    found = reference("heads of 16")
    pairs = [(prompt[:-5], prompt[-5:]) for prompt in found.prompts[2:]]
    scores = {}
    for share in (1.0, 0.1):
        with flexport.LLM(found.directory, dtype="float32", attn_sparsity=share, **AMPLE) as llm:
            scores[share] = llm.score(pairs), llm.score(pairs, through_cache=True)

    assert scores[0.1][0] == pytest.approx(scores[1.0][0], abs=1e-5)
    assert all(abs(a - b) > 1e-3 for a, b in zip(scores[0.1][1], scores[1.0][1], strict=True))


def test_a_cache_whose_keys_are_values_is_refused_and_told_why(reference):
    with (
        pytest.raises(PolicyError, match=r"--attn-sparsity 0\.1 .* keys of .* are its values, too"),
        flexport.LLM(reference("latent").directory, attn_sparsity=0.1) as llm,
    ):
        llm.generate([[5]], SamplingParams(max_tokens=2))


@pytest.mark.parametrize("share", [0, -0.1, 1.5, float("nan"), True, "0.1"])
def test_what_is_no_share_is_refused_at_once(share, reference):
    with pytest.raises(PolicyError, match="attn_sparsity is the share"):
        flexport.LLM(reference("heads of 16").directory, attn_sparsity=share)

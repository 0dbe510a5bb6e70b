"""Scores are transformers' log-probabilities, wherever tensors live and however prompts are cut."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

import flexport
from flexport import SamplingParams
from flexport.errors import UsageError
from flexport.testing.discrete import DiscreteBackend

TOLERANCE = 1e-4
"""Of one token's logarithm; float32 in another order of summation is a tenth of that off."""


def _pairs(found):
    """Contexts and continuations of many lengths, one of them likely throughout."""
    pairs = [(prompt, found.prompts[index - 1]) for index, prompt in enumerate(found.prompts)]
    return [*pairs, (found.prompts[4], found.greedy[4])]


def _expected(found, context, target):
    with torch.no_grad():
        logits_LV = found.model(torch.tensor([[*context, *target]])).logits[0]
    logits_TV = logits_LV[len(context) - 1 : -1]
    targets_T = torch.tensor(target)
    log_probs_T = logits_TV.log_softmax(-1).gather(-1, targets_T[:, None])[:, 0]
    return log_probs_T.tolist(), tuple(logits_TV.argmax(-1).tolist())


OPTIONS = [
    {"percent": [100, 0, 100, 0, 100, 0]},
    {"percent": [0, 0, 0, 0, 0, 0], "batch_size": 3, "prefill_tokens": 16},
    {"percent": [30, 40, 20, 50, 40, 30], "batch_size": 2, "prefill_tokens": 7},
    {"percent": [0, 100, 0, 100, 0, 100], "num_batches": 3, "sweep_tokens": 20},
]


@pytest.mark.parametrize("variant", ["125m-like", "350m-like", "galactica-like"])
@pytest.mark.parametrize("number", range(len(OPTIONS)))
@pytest.mark.parametrize("through_cache", [False, True], ids=["at once", "step by step"])
def test_scores_are_the_log_probabilities_that_transformers_gives(
    variant, number, through_cache, reference, nothing_left
):
    """Half of them on a device with memory of its own, so that each two of these things meet."""
    found, options = reference(variant), OPTIONS[number]
    discrete = (number + ("350" in variant) + through_cache) % 2 == 1
    pairs = _pairs(found)

    with (
        closing(DiscreteBackend()) as device,
        flexport.LLM(
            found.directory, backend=device if discrete else "cpu", dtype="float32",
            device_memory="64MiB", host_memory="64MiB", offload_dir=nothing_left, **options,
        ) as llm,
    ):  # fmt: skip
        scores = llm.score(pairs, through_cache=through_cache)
        tokens = llm.report["tokens"]

    for (context, target), score in zip(pairs, scores, strict=True):
        log_probs, best_ids = _expected(found, context, target)
        assert score.token_log_probs == pytest.approx(log_probs, abs=TOLERANCE)
        assert float(score) == pytest.approx(sum(log_probs), abs=TOLERANCE * len(target))
        assert score.best_token_ids == best_ids
        assert score.is_greedy == (best_ids == tuple(target))
    # All tokens are computed but each row's last one, this way or that.
    assert sum(tokens.values()) == sum(len(context) + len(target) - 1 for context, target in pairs)
    assert (tokens["generated"] > 0) == through_cache
    assert scores[-1].is_greedy
    assert not scores[0].is_greedy


def test_scoring_and_generating_take_turns_on_one_engine(
    reference, continue_greedily, pool_bytes, nothing_left
):
    found = reference()
    pairs = _pairs(found)

    with flexport.LLM(
        found.directory, dtype="float32", percent=[40, 20, 0, 50, 0, 30], device_memory="64MiB",
        offload_dir=nothing_left,
    ) as llm:  # fmt: skip
        first = llm.score(pairs)
        in_use_bytes = pool_bytes(llm)
        ids = continue_greedily(llm, found.prompts, [14] * 10)
        again = llm.score(pairs)
        in_use_later_bytes = pool_bytes(llm)

    assert ids == found.greedy
    assert again == pytest.approx(first, abs=TOLERANCE)
    assert in_use_later_bytes == in_use_bytes


def test_scores_come_as_rows_end_and_a_job_may_be_left_in_the_middle(reference, nothing_left):
    found = reference()
    pairs = _pairs(found)

    with flexport.LLM(
        found.directory, dtype="float32", percent=[0, 0, 0, 0, 0, 0], batch_size=2, num_batches=1,
        device_memory="64MiB", offload_dir=nothing_left,
    ) as llm:  # fmt: skip
        early = llm.engine.score(pairs, through_cache=True)
        index, first = next(early)
        early.close()  # type: ignore[attr-defined]  # it is a generator
        scores = llm.score(pairs, through_cache=True)

    assert scores[index] == pytest.approx(first, abs=TOLERANCE)


def test_nothing_can_be_scored_after_nothing(reference):
    with flexport.LLM(reference().directory, device_memory="64MiB") as llm:
        assert llm.score([]) == []
        with pytest.raises(UsageError, match="neither empty"):
            llm.score([([5], [])])


def test_an_empty_context_is_the_beginning_of_text(reference):
    found = reference()
    with flexport.LLM(found.directory, dtype="float32", device_memory="64MiB") as llm:
        score = llm.score([([], found.prompts[4])])[0]

    log_probs, _ = _expected(found, [2], found.prompts[4])
    assert score.token_log_probs == pytest.approx(log_probs, abs=TOLERANCE)


def test_a_row_longer_than_a_head_group_is_scored_whole(tmp_path):
    """Logits are made for 256 tokens at a time."""
    from transformers import OPTForCausalLM

    from flexport.testing.checkpoints import tiny_opt

    directory = tiny_opt(tmp_path, max_position_embeddings=640)
    model = OPTForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.randint(4, 260, (600,), generator=torch.Generator().manual_seed(3)).tolist()
    with torch.no_grad():
        logits_LV = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    expected_L = logits_LV.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]

    with flexport.LLM(directory, dtype="float32", device_memory="64MiB") as llm:
        scores = llm.score([(ids[:1], ids[1:]), (ids[:300], ids[300:])])
        in_steps = llm.score([(ids[:300], ids[300:])], through_cache=True)
        _ = llm.generate([[5]], SamplingParams(max_tokens=1))

    assert scores[0].token_log_probs == pytest.approx(expected_L.tolist(), abs=TOLERANCE)
    for score in (scores[1], in_steps[0]):
        assert score.token_log_probs == pytest.approx(expected_L[299:].tolist(), abs=TOLERANCE)

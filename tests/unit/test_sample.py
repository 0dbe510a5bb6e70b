"""The next token: transformers' cuts, and draws that know no neighbours.

Dimension key: R rows, V vocabulary.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flexport.engine import sample as module
from flexport.engine.sample import RowSampling, log_probs, row_seed, sample
from flexport.errors import RunError
from flexport.records import SamplingParams

VOCAB_SIZE = 60


def random_logits(num_rows: int, seed: int = 0, vocab_size: int = VOCAB_SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(num_rows, vocab_size, generator=generator)


def row(seed: int = 0, step: int = 0, end_ids=(), previous_ids=(), **params) -> RowSampling:
    return RowSampling(
        params=SamplingParams(**params),
        seed=seed,
        step=step,
        end_ids=end_ids,
        previous_ids=previous_ids,
    )


def draws(logits_V: Tensor, num_draws: int, **params) -> Tensor:
    """Many independent draws from one row of logits."""
    rows = [row(seed=9, step=step, **params) for step in range(num_draws)]
    return sample(logits_V.repeat(num_draws, 1), rows)


def theirs(params: SamplingParams, prompt_ids, end_ids) -> LogitsProcessorList:
    """What transformers' generate would put between logits and draw, in its order."""
    steps: list[LogitsProcessor] = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_tokens and end_ids:
        steps.append(
            MinNewTokensLengthLogitsProcessor(len(prompt_ids), params.min_tokens, list(end_ids))
        )
    if params.temperature > 0:
        steps.append(TemperatureLogitsWarper(params.temperature))
        if params.top_k:
            steps.append(TopKLogitsWarper(params.top_k))
        if params.top_p < 1:
            steps.append(TopPLogitsWarper(params.top_p))
        if params.min_p > 0:
            steps.append(MinPLogitsWarper(params.min_p))
    return LogitsProcessorList(steps)


row_params = st.builds(
    SamplingParams,
    max_tokens=st.just(8),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, VOCAB_SIZE, 1000]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    min_tokens=st.sampled_from([0, 3]),
)


@given(
    params=row_params,
    logits_seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0]),
    step=st.integers(0, 5),
    seed=st.integers(0, 2**64 - 1),
)
@settings(deadline=None, max_examples=200)
def test_a_sample_is_the_inverse_of_the_distribution_that_transformers_makes(
    params, logits_seed, scale, step, seed
):
    # Nearly flat logits give every token, also one below 0, a share that counts.
    logits_1V = scale * random_logits(1, logits_seed)
    prompt_ids = [3, 4, 4, 9]
    previous_ids = [*prompt_ids, *range(step)]
    end_ids = (int(logits_1V.argmax()), 2)
    processors = theirs(params, prompt_ids, end_ids)
    shares_V = processors(torch.tensor([previous_ids]), logits_1V.clone())[0].softmax(-1)

    (token_id,) = sample(
        logits_1V.clone(),
        [
            RowSampling(
                params=params, seed=seed, step=step, end_ids=end_ids, previous_ids=previous_ids
            )
        ],
    )

    if params.temperature == 0:
        assert token_id == shares_V.argmax()
    else:
        # The draw lies in the token's own stretch of the cumulative distribution.
        assert shares_V[token_id] > 0
        drawn = module._uniform(seed, step)
        below = float(shares_V[:token_id].sum())
        assert below - 1e-5 <= drawn <= below + float(shares_V[token_id]) + 1e-5


@given(params=st.lists(row_params, min_size=2, max_size=7), data=st.data())
@settings(deadline=None, max_examples=100)
def test_a_row_gives_the_same_sample_in_whatever_batch_it_lands(params, data):
    logits_RV = random_logits(len(params), seed=3)
    rows = [
        RowSampling(params=p, seed=index, step=2, end_ids=(5,), previous_ids=(1, 2, index))
        for index, p in enumerate(params)
    ]
    chosen = data.draw(
        st.lists(st.sampled_from(range(len(rows))), min_size=1, unique=True), label="batch"
    )

    all_R = sample(logits_RV.clone(), rows)
    some_R = sample(logits_RV[chosen].clone(), [rows[index] for index in chosen])

    assert some_R.tolist() == all_R[chosen].tolist()


def test_a_flat_neighbour_that_needs_more_candidates_changes_no_sample_under_top_p():
    vocab_size = 4 * module._FIRST_CANDIDATES
    peaked_V = random_logits(1, seed=5, vocab_size=vocab_size)[0]
    # Ties at the edge of top-p are where an order of sorting would show.
    peaked_V = peaked_V.round()
    flat_V = torch.zeros(vocab_size)
    rows = [row(seed=seed, temperature=1, top_p=0.9) for seed in range(40)]

    alone_R = sample(peaked_V.repeat(40, 1), rows)
    beside_R = sample(
        torch.cat([peaked_V.repeat(40, 1), flat_V[None]]), [*rows, row(temperature=1, top_p=0.9)]
    )

    assert beside_R[:-1].tolist() == alone_R.tolist()


def test_top_p_finds_its_edge_beyond_the_first_candidates():
    vocab_size = 4 * module._FIRST_CANDIDATES
    # Falling slowly, so that half of the mass takes far more than the first candidates.
    logits_V = -torch.linspace(0, 0.1, vocab_size)
    shares_V = logits_V.softmax(-1)
    num_in = int((shares_V.double().cumsum(-1) < 0.5).sum()) + 1

    drawn_R = draws(logits_V, 2000, temperature=1, top_p=0.5)

    assert num_in > module._FIRST_CANDIDATES
    assert num_in - 20 < int(drawn_R.max()) <= num_in


def test_greedy_takes_the_lowest_of_tied_tokens():
    logits_RV = torch.zeros(2, VOCAB_SIZE)
    logits_RV[0, [7, 30]] = 1

    assert sample(logits_RV, [row(), row()]).tolist() == [7, 0]


def test_greedy_rows_beside_drawing_rows_stay_greedy():
    logits_RV = random_logits(3)
    best_R = logits_RV.argmax(-1)

    chosen_R = sample(logits_RV, [row(), row(temperature=50.0, seed=1), row()])

    assert chosen_R[[0, 2]].tolist() == best_R[[0, 2]].tolist()


@pytest.mark.parametrize(("seen", "unseen"), [(2.0, 1.9), (-1.0, -1.1)])
def test_a_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign(seen, unseen):
    logits_RV = torch.full((2, VOCAB_SIZE), -9.0)
    logits_RV[:, 3], logits_RV[:, 8] = seen, unseen

    chosen_R = sample(
        logits_RV,
        [row(previous_ids=(3, 5, 3), repetition_penalty=penalty) for penalty in (1.0, 1.3)],
    )

    assert chosen_R.tolist() == [3, 8]


def test_the_ends_are_masked_until_min_tokens_and_not_after():
    logits_RV = torch.zeros(2, VOCAB_SIZE)
    logits_RV[:, 5], logits_RV[:, 6], logits_RV[:, 7] = 3, 2, 1

    chosen_R = sample(logits_RV, [row(step=step, min_tokens=4, end_ids=(5, 6)) for step in (3, 4)])

    assert chosen_R.tolist() == [7, 5]


@pytest.mark.parametrize("temperature", [1e-36, 1e-300])
def test_a_tiny_temperature_is_greedy_and_not_nan(temperature):
    logits_RV = 1e4 * random_logits(4)
    best_R = logits_RV.argmax(-1)

    chosen_R = sample(logits_RV, [row(temperature=temperature, seed=seed) for seed in range(4)])

    assert chosen_R.tolist() == best_R.tolist()


def test_draws_follow_the_distribution():
    logits_V = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    num_draws = 4000

    drawn_R = draws(logits_V, num_draws, temperature=1)

    shares_V = torch.bincount(drawn_R, minlength=4) / num_draws
    # Five standard deviations of the widest share: sqrt(0.25 / 4000) = 0.008.
    torch.testing.assert_close(shares_V, logits_V.exp(), rtol=0, atol=0.04)


def test_steps_and_seeds_draw_independently():
    logits_RV = torch.zeros(64, VOCAB_SIZE)

    by_step_R = sample(logits_RV.clone(), [row(temperature=1, step=step) for step in range(64)])
    by_seed_R = sample(logits_RV.clone(), [row(temperature=1, seed=seed) for seed in range(64)])

    assert len(by_step_R.unique()) > 20
    assert len(by_seed_R.unique()) > 20
    assert by_step_R.tolist() != by_seed_R.tolist()


def test_the_generator_is_fixed_for_ever():
    # Philox4x64-10 of numpy, key and counter as given: a resumed job relies on these bits.
    drawn = [module._uniform(0, 0), module._uniform(7, 3), module._uniform(-1, 0)]

    assert drawn == [0.011546754286331562, 0.44205212947108785, 0.4268615279451663]


@pytest.mark.parametrize(("uniform", "expected"), [(0.0, 1), (1.0, 3)])
def test_the_edges_of_the_unit_interval_draw_a_token_that_was_not_cut(uniform, expected):
    shares_1V = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])

    (token_id,) = module._draw(shares_1V, torch.tensor([uniform]))

    assert token_id == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_break_the_run_with_advice(bad, temperature):
    logits_RV = random_logits(3)
    logits_RV[1, 4] = bad

    with pytest.raises(RunError, match=r"1 of 3 rows .* --dtype bfloat16 or float32"):
        sample(logits_RV, [row(temperature=temperature)] * 3)


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, VOCAB_SIZE), []).tolist() == []


def test_a_row_seed_depends_on_run_and_id_alone():
    seeds = {row_seed(run, name) for run in (0, 1) for name in ("a", "b", "1:a")}

    assert len(seeds) == 6
    assert row_seed(0, "a") == row_seed(0, "a")
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_log_probs_are_those_of_log_softmax():
    logits_TV = random_logits(6)
    targets_T = torch.tensor([0, 1, 2, 3, 4, 59])

    expected_T = logits_TV.log_softmax(-1)[torch.arange(6), targets_T]

    torch.testing.assert_close(log_probs(logits_TV, targets_T), expected_T)

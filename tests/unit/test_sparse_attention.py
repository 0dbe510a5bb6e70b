"""Sparse attention is its plain definition, row by row and head by head, however a cache is cut.

Dimension key: N rows, H query heads, K key/value heads, G columns of a page, M columns of a cache,
J columns that are kept, E features of a head.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexport.testing.conformance.attention import ATTENTION_CASES
from flexport.testing.conformance.problems import AttentionProblem, must_be_close
from flexport.torch_ops.attention import step_weights
from flexport.torch_ops.sparse_attention import (
    NO_COLUMN,
    chosen_columns,
    kept_weights,
    num_kept,
    num_seen,
    sum_of_lines,
    sum_of_pages,
)

STEPS = {name: replace(case, queries=1) for name, case in ATTENTION_CASES.items() if case.causal}
"""Every shape and option of attention, as a decode step."""

SHARES = [0.01, 0.1, 0.35, 0.8]


def kept_of(problem, share):
    spec = problem.spec
    starts = spec.starts or (0,) * problem.q_NHLE.shape[0]
    seen_N = [min(spec.length - start, spec.window or spec.length) for start in starts]
    return [num_kept(share, seen) for seen in seen_N]


def sparse_attention(q_NHLE, keys, values, spec, share, num_far=0):
    """A step whose values of the first `num_far` columns come line by line, the others in pages."""
    weights_NHM = step_weights(q_NHLE, keys, spec)
    kept_N = [num_kept(share, seen) for seen in num_seen(spec, len(q_NHLE))]
    columns_NKJ = chosen_columns(weights_NHM, keys[0].shape[1], kept_N)
    kept_NHM = kept_weights(weights_NHM, columns_NKJ)
    far_NKME, near_NKME = torch.cat(list(values), 2).tensor_split([num_far], 2)
    places_NKJ1 = columns_NKJ.clamp(0, max(0, num_far - 1)).unsqueeze(3)
    sums_NHE = sum_of_pages(kept_NHM[:, :, num_far:], near_NKME.split(7, 2))
    if num_far:
        lines_NKJE = far_NKME.gather(2, places_NKJ1.expand(-1, -1, -1, far_NKME.shape[3]))
        is_far_NKJ1 = ((columns_NKJ >= 0) & (columns_NKJ < num_far)).unsqueeze(3)
        lines_NKJE = lines_NKJE.masked_fill(~is_far_NKJ1, 0)
        sums_NHE = sums_NHE + sum_of_lines(kept_NHM, columns_NKJ, lines_NKJE)
    return sums_NHE.to(q_NHLE.dtype).unsqueeze(2)


def defined_choice(weights_NHM, num_kv_heads, kept_N):
    """Of each row and key/value head: the newest column, and those of the largest sums."""
    group = weights_NHM.shape[1] // num_kv_heads
    newest = weights_NHM.shape[2] - 1
    choice = {}
    for n, kept in enumerate(kept_N):
        for k in range(num_kv_heads):
            heads = weights_NHM[n, k * group : (k + 1) * group]
            sums = heads.sum(0).tolist()
            others = sorted(range(newest), key=lambda column: (-sums[column], -column))
            choice[n, k] = sorted([newest, *others][:kept])
    return choice


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("name", STEPS)
def test_a_step_adds_up_the_chosen_columns_by_the_weights_of_full_attention(name, share):
    problem = AttentionProblem.draw(STEPS[name])
    spec, kept_N = problem.spec, kept_of(problem, share)
    num_rows, num_heads = problem.q_NHLE.shape[:2]
    num_kv_heads = problem.keys[0].shape[1]
    weights_NHM = step_weights(problem.q_NHLE, problem.keys, spec)
    choice = defined_choice(weights_NHM, num_kv_heads, kept_N)
    values_NKME = torch.cat(problem.values, 2).double()
    expected = torch.zeros(num_rows, num_heads, 1, values_NKME.shape[3], dtype=torch.float64)
    for n in range(num_rows):
        for h in range(num_heads):
            k = h // (num_heads // num_kv_heads)
            for column in choice[n, k]:
                expected[n, h, 0] += float(weights_NHM[n, h, column]) * values_NKME[n, k, column]

    bound = 1e-5 * max(1.0, float(expected.abs().max()))
    for num_far in (0, spec.length // 2, spec.length - 1):
        found = sparse_attention(problem.q_NHLE, problem.keys, problem.values, spec, share, num_far)
        must_be_close(found, expected, torch.full_like(expected, bound), torch.float32)


@pytest.mark.parametrize("name", STEPS)
def test_all_columns_together_are_full_attention(name):
    problem = AttentionProblem.draw(STEPS[name])

    found = sparse_attention(problem.q_NHLE, problem.keys, problem.values, problem.spec, 1.0)

    problem.check(found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_full_attention(dtype):
    problem = AttentionProblem.draw(STEPS["eight queries a key"], dtype)

    found = sparse_attention(problem.q_NHLE, problem.keys, problem.values, problem.spec, 1.0)

    problem.check(found)


@given(st.data())
def test_a_choice_is_made_of_the_largest_sums_newest_first(data):
    """Few levels, so that most weights have many equals; 0 is for a row that nobody asks about."""
    num_rows, num_kv_heads, group = (data.draw(st.integers(1, 3)) for _ in range(3))
    num_columns = data.draw(st.integers(1, 12))
    kept_N = [data.draw(st.integers(0, num_columns)) for _ in range(num_rows)]
    size = num_rows * num_kv_heads * group * num_columns
    levels = data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    weights_NHM = torch.tensor(levels, dtype=torch.float32).view(num_rows, -1, num_columns)

    columns_NKJ = chosen_columns(weights_NHM, num_kv_heads, kept_N)

    choice = defined_choice(weights_NHM, num_kv_heads, kept_N)
    for (n, k), expected in choice.items():
        padding = [NO_COLUMN] * (max(kept_N) - kept_N[n])
        assert columns_NKJ[n, k].tolist() == expected + padding


@pytest.mark.parametrize("share", SHARES)
def test_a_row_keeps_the_same_columns_in_whatever_batch_and_pages(share):
    case = STEPS["rows that start late"]
    problem = AttentionProblem.draw(case)
    together = sparse_attention(problem.q_NHLE, problem.keys, problem.values, problem.spec, share)

    for row, start in enumerate(case.starts or ()):
        own = slice(start, case.length)
        keys, values = (
            torch.cat(pages, 2)[row : row + 1, :, own].split(5, 2)
            for pages in (problem.keys, problem.values)
        )
        spec = replace(problem.spec, starts=None, length=case.length - start)
        alone = sparse_attention(problem.q_NHLE[row : row + 1], keys, values, spec, share)
        assert torch.allclose(alone[0], together[row], atol=1e-6)


def test_the_newest_column_is_kept_though_its_weight_is_the_smallest():
    weights_NHM = torch.tensor([[[0.5, 0.3, 0.15, 0.05]]])

    assert chosen_columns(weights_NHM, 1, [1]).tolist() == [[[3]]]
    assert chosen_columns(weights_NHM, 1, [2]).tolist() == [[[0, 3]]]


def test_a_choice_leaves_the_weights_as_they_are():
    weights_NHM = torch.tensor([[[0.5, 0.3, 0.2]]])
    before_NHM = weights_NHM.clone()

    kept_NHM = kept_weights(weights_NHM, chosen_columns(weights_NHM, 1, [2]))

    assert torch.equal(weights_NHM, before_NHM)
    # Of the weights a third is missing, and nothing stands in for it.
    assert kept_NHM.tolist() == torch.tensor([[[0.5, 0.0, 0.2]]]).tolist()


def test_a_row_that_nobody_asks_about_keeps_nothing():
    weights_NHM = torch.full((2, 2, 3), 1 / 3)

    columns_NKJ = chosen_columns(weights_NHM, 1, [2, 0])

    assert columns_NKJ.tolist() == [[[1, 2]], [[NO_COLUMN, NO_COLUMN]]]
    assert kept_weights(weights_NHM, columns_NKJ)[1].sum() == 0


@pytest.mark.parametrize(
    ("share", "seen", "kept"),
    [
        (0.1, 30, 3),
        (0.1, 31, 4),
        (0.1, 1, 1),
        (1e-9, 7, 1),
        (1.0, 7, 7),
        (0.7, 10, 7),
        (0.29, 100, 29),
        (0.07, 100, 7),
    ],
)
def test_a_share_is_rounded_up_and_nothing_is_added_by_binary_fractions(share, seen, kept):
    assert num_kept(share, seen) == kept

"""The zig-zag order: what is computed, in which order, and how often."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from flexport.schedule.order import (
    BatchPlan,
    Piece,
    Rota,
    joined,
    zigzag,
)

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)
MOST_TOKENS = st.integers(1, 60)


def piece(batch, start=0):
    return Piece(batch=batch, rows=None, start=start, stop=start + 1, num_tokens=1)


def test_all_batches_pass_a_layer_before_any_passes_the_next():
    visits = list(zigzag(0, 2, [(piece(0),), (piece(1),), (piece(2),)]))

    order = [(visit.layer, visit.pieces[0].batch) for visit in visits]
    assert order == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_the_first_and_the_last_visit_of_a_layer_say_so():
    visits = list(zigzag(7, 2, [(piece(0),), (piece(1),)]))

    assert [visit.first for visit in visits] == [True, False, True, False]
    assert [visit.last for visit in visits] == [False, True, False, True]
    assert {visit.sweep for visit in visits} == {7}


def prefill_pieces(lengths, max_tokens, shares=()):
    """All pieces of a batch's prefill, taken in these shares and then all at once."""
    plan = BatchPlan(0, lengths, 1, max_tokens)
    return [each for share in (*shares, math.inf) for each in plan.take(share)]


@given(lengths=LENGTHS, max_tokens=MOST_TOKENS, shares=st.lists(st.integers(0, 20), max_size=6))
def test_prefill_computes_every_prompt_token_once_and_in_order(lengths, max_tokens, shares):
    pieces = prefill_pieces(lengths, max_tokens, shares)

    columns = max(lengths)
    computed: list[list[int]] = [[] for _ in lengths]
    for each in pieces:
        found = 0
        for row in range(*each.rows):
            start = columns - lengths[row]
            positions = range(max(0, each.start - start), each.stop - start)
            computed[row].extend(positions)
            found += len(positions)
        assert found == each.num_tokens
        assert (each.rows[1] - each.rows[0]) * (each.stop - each.start) <= max_tokens
    assert computed == [list(range(length)) for length in lengths]


@given(lengths=LENGTHS, max_tokens=MOST_TOKENS)
def test_prefill_cuts_no_row_that_has_room_as_a_whole(lengths, max_tokens):
    for each in prefill_pieces(lengths, max_tokens):
        is_cut = each.num_tokens < sum(lengths[slice(*each.rows)])
        assert not is_cut or max(lengths[slice(*each.rows)]) > max_tokens


@given(lengths=LENGTHS, max_tokens=MOST_TOKENS, shares=st.lists(st.integers(0, 20), max_size=6))
def test_a_share_of_the_prefill_is_what_was_asked_for_while_there_is_any(
    lengths, max_tokens, shares
):
    plan = BatchPlan(0, lengths, 1, max_tokens)

    left = sum(lengths)
    for share in shares:
        taken = sum(each.num_tokens for each in plan.take(share))
        assert taken == min(share, left)
        left -= taken


@dataclass
class Job:
    """Batches that wait for a slot and end when they are told to."""

    batches: list[tuple[list[int], int]]
    num_slots: int
    max_tokens: int
    under_way: dict[int, BatchPlan] = field(default_factory=dict)
    admitted: int = 0

    def admit(self):
        while self.admitted < len(self.batches) and len(self.under_way) < self.num_slots:
            lengths, max_steps = self.batches[self.admitted]
            plan = BatchPlan(self.admitted, lengths, max_steps, self.max_tokens)
            self.under_way[self.admitted] = plan
            self.admitted += 1
            yield plan

    def is_waiting(self):
        return self.admitted < len(self.batches)

    def end(self, batch):
        self.under_way.pop(batch).ended = True


def run(job, num_layers, sweep_tokens, join_tokens=0, steps_of=None):
    """All visits, with each batch ended at the head visit of its last step."""
    visits = []
    steps: Counter[int] = Counter()
    for visit in Rota(num_layers, sweep_tokens, join_tokens, job.admit, job.is_waiting).visits():
        assert visit is not None, "nothing is fetched ahead here, so the next visit is known"
        visits.append(visit)
        for each in visit.pieces if visit.layer == num_layers - 1 else ():
            lengths, max_steps = job.batches[each.batch]
            has_last_row = each.rows is None or each.rows[1] == len(lengths)
            steps[each.batch] += has_last_row and each.stop >= max(lengths)
            if steps[each.batch] == (steps_of or {}).get(each.batch, max_steps):
                job.end(each.batch)
    return visits


@given(
    batches=st.lists(st.tuples(LENGTHS, st.integers(1, 5)), min_size=1, max_size=5),
    num_slots=st.integers(1, 4),
    max_tokens=MOST_TOKENS,
    sweep_tokens=st.sampled_from([0, 1, 7, 40]),
    join_tokens=st.sampled_from([0, 1, 5, 100]),
)
def test_each_token_of_each_row_passes_each_layer_once(
    batches, num_slots, max_tokens, sweep_tokens, join_tokens
):
    visits = run(Job(batches, num_slots, max_tokens), 3, sweep_tokens, join_tokens)

    tokens: Counter[tuple[int, int]] = Counter()
    for visit in visits:
        for each in visit.pieces:
            tokens[visit.layer, each.batch] += each.num_tokens
    for number, (lengths, max_steps) in enumerate(batches):
        # A row's last token is sampled and not computed.
        expected = sum(lengths) + (max_steps - 1) * len(lengths)
        assert [tokens[layer, number] for layer in range(3)] == [expected] * 3


@given(
    batches=st.lists(st.tuples(LENGTHS, st.integers(1, 5)), min_size=2, max_size=5),
    sweep_tokens=st.integers(1, 60),
)
def test_sweeps_carry_their_share_of_prompt_tokens_while_there_are_prompts(batches, sweep_tokens):
    visits = run(Job(batches, len(batches), max_tokens=sweep_tokens), 2, sweep_tokens)

    prompts: Counter[int] = Counter()
    for visit in visits:
        for each in visit.pieces if visit.layer == 0 else ():
            prompts[visit.sweep] += each.num_tokens if each.rows is not None else 0
    left = sum(sum(lengths) for lengths, _ in batches)
    for sweep in range(visits[-1].sweep + 1):
        assert prompts[sweep] == min(sweep_tokens, left)
        left -= prompts[sweep]


def test_a_bounded_sweep_mixes_prompts_of_one_batch_with_steps_of_another():
    visits = run(Job([([8], 4), ([8], 4)], 2, 8), 1, 8)

    kinds = [
        sorted("prompt" if v.pieces[0].rows else "step" for v in visits if v.sweep == sweep)
        for sweep in range(visits[-1].sweep + 1)
    ]
    assert kinds[:3] == [["prompt"], ["prompt", "step"], ["step", "step"]]


@given(sizes=st.lists(st.integers(1, 9), max_size=8), max_tokens=st.integers(0, 20))
def test_pieces_are_joined_in_their_order_up_to_so_many_tokens(sizes, max_tokens):
    pieces = [
        Piece(batch=batch, rows=(0, 1) if batch % 3 else None, start=0, stop=1, num_tokens=size)
        for batch, size in enumerate(sizes)
    ]

    groups = joined(pieces, max_tokens)

    assert [each for group in groups for each in group] == pieces
    for group, after in zip(groups, [*groups[1:], None], strict=False):
        num_tokens = sum(each.num_tokens for each in group)
        assert num_tokens <= max_tokens or len(group) == 1
        assert after is None or num_tokens + after[0].num_tokens > max_tokens


def test_two_chunks_of_one_prompt_are_never_computed_together():
    chunks = prefill_pieces([9], 3)

    assert joined(chunks, 100) == [(chunk,) for chunk in chunks]


def test_a_batch_that_ends_early_makes_room_for_the_next_one():
    visits = run(Job([([3], 9), ([3], 2)], 1, 8), 1, 0, steps_of={0: 2})

    assert [visit.pieces[0].batch for visit in visits] == [0, 0, 1, 1]


def test_the_order_waits_for_batches_that_could_not_join_yet():
    """A batch that has ended holds its slot until what was fetched ahead for it has passed."""
    second = BatchPlan(1, [2], 1, 8)
    answers = iter([[BatchPlan(0, [2], 1, 8)], [], [second], []])
    waiting = iter([True, False])
    rota = Rota(1, 0, 0, lambda: next(answers), lambda: next(waiting))
    visits = rota.visits()

    first = next(visits)
    assert first is not None
    rota._batches[0].ended = True

    assert next(visits) is None
    then = next(visits)
    assert then is not None
    assert then.pieces[0].batch == 1
    second.ended = True
    assert list(visits) == []


def test_a_prompt_larger_than_a_sweeps_share_does_not_wait_for_others_to_finish():
    """Two batches of 8 prompt tokens at 4 a sweep: the second joins while the first decodes."""
    visits = run(Job([([8], 6), ([8], 6)], 2, 8), 1, 4)

    second_starts = min(visit.sweep for visit in visits if visit.pieces[0].batch == 1)
    first_ends = max(visit.sweep for visit in visits if visit.pieces[0].batch == 0)

    assert second_starts < first_ends

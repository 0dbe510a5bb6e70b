"""Shares become row ranges: every row once, exact to a row, even over depth."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flexport.policy import Split, Tier
from flexport.store.place import Dealer, Part


@st.composite
def splits(draw):
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Split(device=device / 100, host=host / 100, disk=(100 - device - host) / 100)


LAYERS = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 4, 64])), min_size=1, max_size=5),
    min_size=1,
    max_size=6,
)


@given(split=splits(), layers=LAYERS)
def test_every_row_is_dealt_once_and_nearer_tiers_come_first(split, layers):
    dealer = Dealer(split)

    for tensors in layers:
        parts = dealer.cut(tensors)

        dealt = [(part.index, row) for part in parts for row in range(part.begin, part.end)]
        expected = [(i, row) for i, (rows, _) in enumerate(tensors) for row in range(rows)]
        assert dealt == expected
        order = [list(Tier).index(part.tier) for part in parts]
        assert order == sorted(order)
        assert all(part.num_rows > 0 for part in parts)


@given(split=splits(), layers=LAYERS)
def test_at_any_depth_a_tier_has_its_share_to_within_a_row(split, layers):
    dealer = Dealer(split)
    found: Counter[Tier] = Counter()
    total_bytes = widest = 0

    for tensors in layers:
        for part in dealer.cut(tensors):
            found[part.tier] += part.num_rows * tensors[part.index][1]
        total_bytes += sum(rows * row_bytes for rows, row_bytes in tensors)
        widest = max(widest, *(row_bytes for _, row_bytes in tensors))
        for tier in Tier:
            # Each of the two cuts is off by half a row of the tensor it goes through.
            assert abs(found[tier] - split.share(tier) * total_bytes) <= widest + 1e-6 * total_bytes


@given(layers=LAYERS, tier=st.sampled_from(list(Tier)))
def test_a_share_of_one_is_everything_and_a_share_of_none_is_nothing(layers, tier):
    dealer = Dealer(Split(**{"device": 0.0, tier.value: 1.0}))

    parts = [part for tensors in layers for part in dealer.cut(tensors)]

    assert {part.tier for part in parts} == {tier}


def test_single_rows_take_turns():
    dealer = Dealer(Split(device=0.5, disk=0.5))

    tiers = [dealer.cut([(1, 8)])[0].tier for _ in range(6)]

    assert Counter(tiers) == {Tier.DEVICE: 3, Tier.DISK: 3}
    assert all(here is not after for here, after in pairwise(tiers))


def test_a_cut_goes_through_a_tensor():
    parts = Dealer(Split(device=0.25, host=0.5, disk=0.25)).cut([(8, 4)])

    assert parts == [
        Part(index=0, begin=0, end=2, tier=Tier.DEVICE),
        Part(index=0, begin=2, end=6, tier=Tier.HOST),
        Part(index=0, begin=6, end=8, tier=Tier.DISK),
    ]

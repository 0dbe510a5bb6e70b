"""The slopes of ALiBi, arXiv:2108.12409."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flexport.models.alibi import alibi_slopes


def test_eight_heads_have_the_slopes_of_the_paper():
    assert alibi_slopes(8) == tuple(2.0**-power for power in range(1, 9))


def test_twelve_heads_have_those_of_eight_and_every_other_one_of_sixteen():
    assert alibi_slopes(12) == (*alibi_slopes(8), *alibi_slopes(16)[:8:2])


@given(st.integers(1, 200), st.sampled_from([8.0, 16.0]))
def test_each_head_has_a_slope_of_its_own_down_to_the_bias_asked_for(num_heads, bias_max):
    slopes = alibi_slopes(num_heads, bias_max)

    assert len(set(slopes)) == len(slopes) == num_heads
    assert min(slopes) == 2.0**-bias_max
    assert max(slopes) < 1

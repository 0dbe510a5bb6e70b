"""Sizes and times as people write them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.units import format_bytes, format_rate, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("14GiB", 14 * 2**30),
        ("14 gib", 14 * 2**30),
        ("800m", 800 * 2**20),
        ("1.5 GB", 1_500_000_000),
        ("0.5k", 512),
        ("2TiB", 2**41),
        ("0", 0),
    ],
)
def test_a_size_is_read_as_people_write_it(text, num_bytes):
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1.5.2k", "12 parsecs", "1e9", "٣ GiB x"])
def test_what_is_not_a_size_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=re.escape(repr(text)) + ".*14GiB"):
        parse_bytes(text)


@given(st.integers(min_value=0, max_value=2**50))
def test_a_formatted_size_reads_back_within_its_two_decimals(num_bytes):
    text = format_bytes(num_bytes)

    # Two decimals of at least 1.00 of a unit: half a hundredth, which is half a per cent.
    assert parse_bytes(text) == pytest.approx(num_bytes, rel=0.005, abs=0.5)


def test_a_rate_is_in_decimal_units_as_links_are_sold():
    assert format_rate(1.5e9) == "1.50 GB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.84, "0.8 s"),
        (125, "2 min 05 s"),
        (119.9, "2 min 00 s"),
        (3599.7, "1 h 00 min"),
        (11_520, "3 h 12 min"),
    ],
)
def test_a_duration_has_two_units_at_most(seconds, text):
    assert format_seconds(seconds) == text

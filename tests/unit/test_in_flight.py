"""What was taken and is not done is remembered, and nothing else is."""

from __future__ import annotations

import gc
import weakref
from itertools import count, islice

import pytest

from flexport.engine.in_flight import InFlight


def test_what_is_left_comes_before_what_is_new():
    rows = InFlight(iter(range(6)))
    first = rows.remaining()
    for _ in range(4):
        next(first)
    rows.done(1)
    rows.done(3)

    assert len(rows) == 2
    assert list(rows.remaining()) == [0, 2, 4, 5]


def test_rows_that_were_looked_at_are_left_until_they_are_done():
    rows = InFlight(count())

    assert rows.peek(3) == [0, 1, 2]
    assert list(islice(rows.remaining(), 5)) == [0, 1, 2, 3, 4]


def test_equal_rows_are_as_many_as_there_are():
    rows = InFlight("aab")
    assert rows.peek(3) == ["a", "a", "b"]
    rows.done("a")

    assert sorted(rows.remaining()) == ["a", "b"]


def test_a_row_that_is_done_is_not_held():
    class Row:
        pass

    rows = InFlight(Row() for _ in range(3))
    refs = []
    for row in rows.remaining():
        refs.append(weakref.ref(row))
        rows.done(row)
    del row
    gc.collect()

    assert [ref() for ref in refs] == [None] * 3
    assert len(rows) == 0


def test_an_error_of_the_source_is_told_from_others():
    def broken():
        yield 1
        raise ValueError("a bad line")

    rows = InFlight(broken())

    with pytest.raises(ValueError, match="a bad line"):
        list(rows.remaining())
    assert isinstance(rows.source_error, ValueError)

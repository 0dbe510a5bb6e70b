"""The one loop: fetch ahead, compute, write back."""

from __future__ import annotations

import pytest

from flexport.schedule.executor import execute
from flexport.schedule.order import Piece, Visit


def visit(number):
    piece = Piece(batch=number, rows=None, start=0, stop=1, num_tokens=1)
    return Visit(sweep=0, layer=0, pieces=(piece,), first=True, last=True, steps_only=False)


class Ticket:
    def __init__(self, work, number):
        self.work, self.number = work, number

    def wait(self):
        self.work.diary.append(("wait", self.number))

    join = wait


class Work:
    """Room for so many visits; a diary of what was called."""

    def __init__(self, room):
        self.room = room
        self.diary = []
        self.held = set()
        self.most = 0

    def has_room_for(self, visit):
        return len(self.held) < self.room

    def fetch(self, visit):
        self.diary.append(("fetch", visit.pieces[0].batch))
        self.held.add(visit.pieces[0].batch)
        self.most = max(self.most, len(self.held))

    def ready(self, visit):
        return Ticket(self, visit.pieces[0].batch)

    def compute(self, visit):
        assert visit.pieces[0].batch in self.held
        self.diary.append(("compute", visit.pieces[0].batch))

    def write_back(self, visit):
        self.diary.append(("write back", visit.pieces[0].batch))
        self.held.remove(visit.pieces[0].batch)

    def numbers(self, verb):
        return [number for word, number in self.diary if word == verb]


@pytest.mark.parametrize("room", [0, 1, 2, 5, 100])
def test_visits_are_computed_in_order_and_as_many_are_fetched_ahead_as_there_is_room_for(room):
    work = Work(room)

    done = list(execute(map(visit, range(20)), work))

    assert [each.pieces[0].batch for each in done] == list(range(20))
    for verb in ("fetch", "wait", "compute", "write back"):
        assert work.numbers(verb) == list(range(20))
    assert work.most == min(max(room, 1), 20)


def test_a_visit_waits_for_its_own_copies_after_the_next_ones_were_started():
    work = Work(2)

    list(execute(map(visit, range(3)), work))

    assert work.diary[:4] == [("fetch", 0), ("fetch", 1), ("wait", 0), ("compute", 0)]


def test_where_the_next_visit_depends_on_those_before_it_they_are_computed_first():
    work = Work(10)

    def order():
        yield visit(0)
        yield visit(1)
        while work.numbers("write back") != [0, 1]:
            yield None
        yield visit(2)

    done = list(execute(order(), work))

    assert [each.pieces[0].batch for each in done] == [0, 1, 2]


def test_an_order_that_waits_for_nothing_is_a_mistake():
    with pytest.raises(AssertionError, match="none is under way"):
        list(execute(iter([None]), Work(1)))


def test_an_error_in_a_visit_comes_through(monkeypatch):
    work = Work(3)

    monkeypatch.setattr(work, "ready", lambda visit: (_ for _ in ()).throw(OSError("no")))

    with pytest.raises(OSError, match="no"):
        list(execute(map(visit, range(3)), work))


def test_no_visits_are_no_work():
    work = Work(1)

    assert list(execute(iter([]), work)) == []
    assert work.diary == []

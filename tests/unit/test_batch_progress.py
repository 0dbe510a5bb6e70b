from __future__ import annotations

import io

from flexport.cli.progress import PackingLines, ProgressLines


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_comes_every_ten_seconds_with_rate_and_time_left() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLines(100, stream, clock)

    for _ in range(30):
        clock.now_s += 1
        progress.answered(5)
        progress.tick()

    assert stream.getvalue().splitlines() == [
        "flexport: 10 of 100 rows, 5.0 tok/s, about 1 min 30 s left",
        "flexport: 20 of 100 rows, 5.0 tok/s, about 1 min 20 s left",
        "flexport: 30 of 100 rows, 5.0 tok/s, about 1 min 10 s left",
    ]


def test_rows_done_by_an_earlier_run_do_not_make_this_one_look_fast() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLines(100, stream, clock)

    for _ in range(50):
        progress.skipped()
    clock.now_s += 10
    progress.answered(20)
    progress.tick()

    assert stream.getvalue() == "flexport: 51 of 100 rows, 2.0 tok/s, about 8 min 10 s left\n"


def test_where_the_end_is_unknown_no_time_left_is_claimed() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLines(None, stream, clock)

    clock.now_s += 10
    progress.failed()
    progress.tick()

    assert stream.getvalue() == "flexport: 1 rows, 1 failed, 0.0 tok/s\n"


def test_packing_says_what_it_does_and_every_ten_seconds_how_far_it_is() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = PackingLines(stream, clock)

    progress.begin("packing", 100 << 20)
    for _ in range(25):
        clock.now_s += 1
        progress.advance(1 << 20)
    progress.begin("checking", 5)

    assert stream.getvalue().splitlines() == [
        "flexport: packing",
        "flexport: 10.00 MiB of 100.00 MiB, 1 MB/s, about 1 min 30 s left",
        "flexport: 20.00 MiB of 100.00 MiB, 1 MB/s, about 1 min 20 s left",
        "flexport: checking",
    ]


def test_before_a_row_has_ended_the_time_left_is_the_predicted_one() -> None:
    clock, stream = Clock(), io.StringIO()
    known: list[float] = []
    progress = ProgressLines(100, stream, clock, predicted_s=lambda: known[0] if known else None)

    for step in range(4):
        clock.now_s += 10
        if step == 1:
            known.append(90.0)
        if step == 3:
            progress.answered(20)
        progress.tick()
    clock.now_s += 100
    progress.tick()

    assert stream.getvalue().splitlines() == [
        "flexport: 0 of 100 rows, 0.0 tok/s",
        "flexport: 0 of 100 rows, 0.0 tok/s, about 1 min 10 s left, as predicted",
        "flexport: 0 of 100 rows, 0.0 tok/s, about 1 min 00 s left, as predicted",
        "flexport: 1 of 100 rows, 0.5 tok/s, about 1 h 06 min left",
        "flexport: 1 of 100 rows, 0.1 tok/s, about 3 h 51 min left",
    ]


def test_a_prediction_that_has_run_out_is_not_repeated() -> None:
    clock, stream = Clock(), io.StringIO()
    progress = ProgressLines(100, stream, clock, predicted_s=lambda: 5.0)

    clock.now_s += 10
    progress.tick()

    assert stream.getvalue() == "flexport: 0 of 100 rows, 0.0 tok/s\n"

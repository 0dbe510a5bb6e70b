"""What an engine predicts is for the whole job, and stands beside what it then measured."""

from __future__ import annotations

import pytest

import flexport
from flexport.engine.engine import PEEK_ROWS
from flexport.planner.predict import COMPUTE
from flexport.records import Request, SamplingParams


def requests(count: int, new_tokens: int = 1) -> list[Request]:
    sampling = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    return [
        Request(request_id=str(number), token_ids=(5, 6, 7), sampling=sampling)
        for number in range(count)
    ]


@pytest.fixture
def llm(reference, nothing_left):
    with flexport.LLM(reference().directory, backend="cpu", offload_dir=nothing_left) as llm:
        yield llm


@pytest.mark.parametrize(
    ("count", "said", "planned"),
    [
        (PEEK_ROWS + 8, PEEK_ROWS + 90, PEEK_ROWS + 90),
        (PEEK_ROWS + 8, 3, PEEK_ROWS),  # more came than was said
        (PEEK_ROWS + 8, None, None),
        (5, 700, 5),  # all of them were looked at
    ],
    ids=["said", "said too few", "unknown", "few"],
)
def test_a_stream_is_planned_for_as_many_rows_as_its_caller_says(llm, count, said, planned):
    rows = iter(requests(count))

    num_answers = sum(1 for _ in llm.engine.generate(rows, num_rows=said))

    assert num_answers == count
    assert llm.plan.job.num_rows == planned


def test_requests_that_have_a_length_are_planned_for_as_a_whole(llm):
    rows = requests(PEEK_ROWS + 8)

    num_answers = sum(1 for _ in llm.engine.generate(rows))

    assert num_answers == llm.plan.job.num_rows == PEEK_ROWS + 8


def test_a_report_has_the_prediction_for_the_rows_that_ended(llm):
    sampling = SamplingParams(max_tokens=9, ignore_eos=True)
    end = SamplingParams(max_tokens=9, stop_token_ids=tuple(range(260)))  # after a token or so

    llm.generate([[5] * 4, [6] * 4], sampling)
    all_of_it = llm.report
    llm.generate([[5] * 4, [6] * 4], end)
    early = llm.report

    for report in (all_of_it, early):
        compared = report["comparison"]
        assert report["rows"] == 2
        assert report["warnings"] == []
        assert set(compared["predicted"]) == set(compared["measured"])
        assert compared["measured"]["seconds"] == report["seconds"]
        assert compared["ratio"] > 0
    assert early["tokens"]["generated"] < all_of_it["tokens"]["generated"]
    before, after = (
        each["comparison"]["predicted"]["busy_seconds"][COMPUTE] for each in (all_of_it, early)
    )
    assert after < before
    assert early["predicted"]["busy_seconds"] == all_of_it["predicted"]["busy_seconds"]

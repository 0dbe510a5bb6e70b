"""The nouns that rooms share: sampling parameters, requests, outputs."""

from __future__ import annotations

import math

import pytest

from flexport.records import Request, RequestOutput, SamplingParams


def test_the_default_is_greedy_with_every_cut_off():
    params = SamplingParams()

    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.0, 1.0, 0, 0.0)


@pytest.mark.parametrize("stop", ["end", ["end"], ("end",)])
def test_one_stop_string_is_as_good_as_a_list_of_one(stop):
    assert SamplingParams(stop=stop).stop == ("end",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 17),  # more than the default max_tokens
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -1),
        ("min_p", 1.5),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.nan),
        ("stop", ("",)),
        ("stop", ""),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name.split("_")[0]):
        SamplingParams(**{name: value})


def test_a_request_may_grow_to_its_prompt_plus_what_it_may_generate():
    request = Request(request_id="a", token_ids=(5, 6, 7), sampling=SamplingParams(max_tokens=4))

    assert request.num_tokens == 7


def test_request_outputs_do_not_share_their_lists():
    first = RequestOutput(request_id="a", prompt=None, prompt_token_ids=[1])
    second = RequestOutput(request_id="b", prompt=None, prompt_token_ids=[1])

    assert first.outputs == []
    assert first.outputs is not second.outputs

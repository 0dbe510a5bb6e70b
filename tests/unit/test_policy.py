"""The policy: nine shares and a block shape, valid once built."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.errors import PolicyError
from flexport.policy import CACHE_CODECS, Policy, Split, Tier


@st.composite
def splits(draw: st.DrawFn) -> Split:
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Split(device=device / 100, host=host / 100, disk=(100 - device - host) / 100)


policies = st.builds(
    Policy,
    weights=splits(),
    cache=splits(),
    activations=splits(),
    batch_size=st.integers(1, 512),
    num_batches=st.integers(1, 64),
    prefill_tokens=st.integers(1, 1 << 20),
    sweep_tokens=st.integers(0, 1 << 20),
    cpu_attention=st.booleans(),
    cpu_projections=st.booleans(),
) | st.builds(Policy, cache=splits(), compress_cache=st.sampled_from(CACHE_CODECS))


@given(policies)
def test_a_policy_comes_back_from_its_json_unchanged(policy):
    assert Policy.from_dict(json.loads(policy.to_json())) == policy


@given(policies)
def test_a_policy_comes_back_from_its_file_unchanged(tmp_path_factory, policy):
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    path.write_text(policy.to_json(), encoding="utf-8")

    assert Policy.from_file(path) == policy


@pytest.mark.parametrize("beside", [{}, {"predicted": {"generation_tok_s": 2.5}, "model": "x"}])
def test_a_plan_or_report_in_a_file_has_its_policy_under_that_name(tmp_path, beside):
    policy = Policy(cache=Split(device=0.25, host=0.5, disk=0.25), batch_size=3)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"policy": policy.to_dict(), **beside}), encoding="utf-8")

    assert Policy.from_file(path) == policy


@given(splits())
def test_a_share_has_the_name_of_its_tier(split):
    assert tuple(split.share(tier) for tier in Tier) == split.shares()


def test_a_policy_can_not_be_changed():
    policy = Policy()

    with pytest.raises(FrozenInstanceError):
        policy.batch_size = 2  # type: ignore[misc]


def test_a_block_is_all_micro_batches_that_share_a_sweep():
    assert Policy(batch_size=4, num_batches=3).block_size == 12


@pytest.mark.parametrize(
    "shares",
    [
        {"device": 0.5},
        {"device": 1.5, "host": -0.5},
        {"device": 0.5, "host": 0.6},
        {"device": math.nan},
        {"device": 0.0, "host": math.nan},
        {"device": math.inf, "host": -math.inf},
    ],
)
def test_shares_that_do_not_add_up_are_refused(shares):
    with pytest.raises(PolicyError, match="add up to 1"):
        Split(**shares)


@pytest.mark.parametrize("name", ["batch_size", "num_batches", "prefill_tokens"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "4"])
def test_a_block_shape_needs_whole_positive_numbers(name, value):
    with pytest.raises(PolicyError, match=name):
        Policy(**{name: value})


@pytest.mark.parametrize("value", [-1, 0.5])
def test_sweep_tokens_may_be_zero_but_not_less(value):
    assert Policy(sweep_tokens=0).sweep_tokens == 0
    with pytest.raises(PolicyError, match="sweep_tokens"):
        Policy(sweep_tokens=value)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, math.nan, True, "0.1", None])
def test_a_share_of_values_is_above_0_and_at_most_1(value):
    assert Policy(attn_sparsity=1).attn_sparsity == 1
    with pytest.raises(PolicyError, match="attn_sparsity"):
        Policy(attn_sparsity=value)


@pytest.mark.parametrize("name", ["cpu_attention", "cpu_projections"])
@pytest.mark.parametrize("value", [1, "on", None])
def test_a_switch_is_true_or_false(name, value):
    with pytest.raises(PolicyError, match=name):
        Policy(**{name: value})


@given(st.lists(splits(), min_size=3, max_size=3))
def test_six_numbers_say_all_nine_shares(kinds):
    percent = [100 * share for split in kinds for share in split.shares()[:2]]

    found = Policy.splits_from_percent(percent)

    for split, expected in zip(found, kinds, strict=True):
        assert split.shares() == pytest.approx(expected.shares(), abs=1e-9)


@pytest.mark.parametrize(
    ("percent", "said"),
    [
        ((100, 0), "six numbers"),
        ((60, 50, 0, 0, 0, 0), "weights"),
        ((0, 0, -1, 0, 0, 0), "KV"),
        ((0, 0, 0, 0, 0, 101), "activations"),
        ((math.nan, 0, 0, 0, 0, 0), "add up to 1"),
    ],
)
def test_impossible_percent_says_which_kind_is_wrong(percent, said):
    with pytest.raises(PolicyError, match=said):
        Policy.splits_from_percent(percent)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a list, not an object"),
        ('{"batchsize": 4}', r"unknown policy fields \['batchsize'\].*batch_size"),
        ('{"weights": {"device": 0.5}}', "add up to 1"),
        ('{"weights": {"gpu": 1.0}}', "'weights'.*gpu"),
        ('{"weights": 1.0}', "'weights'"),
        ('{"weights": {"device": NaN}}', "add up to 1"),
        ('{"policy": 1}', "must be an object"),
        ('{"policy": {"batchsize": 4}, "plan": {}}', r"unknown policy fields \['batchsize'\]"),
    ],
)
def test_a_file_that_is_no_policy_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "policy.json"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(PolicyError, match=rf"(?s)policy\.json.*{said}"):
        Policy.from_file(path)


def test_a_missing_policy_file_is_refused_by_name(tmp_path):
    with pytest.raises(PolicyError, match=r"can't read the policy file .*absent\.json"):
        Policy.from_file(tmp_path / "absent.json")


@pytest.mark.parametrize("value", ["int2", "", None, 4, True])
def test_a_cache_is_kept_in_a_codec_that_there_is(value):
    with pytest.raises(PolicyError, match="compress_cache is one of none, int8, int4"):
        Policy(compress_cache=value)


def test_prompts_that_sweeps_share_out_and_a_packed_cache_are_refused_together():
    Policy(compress_cache="none", sweep_tokens=100)

    with pytest.raises(PolicyError, match="compress_cache int8 and sweep_tokens 100"):
        Policy(compress_cache="int8", sweep_tokens=100)

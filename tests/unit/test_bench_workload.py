"""The work that is measured, what it costs at least, and how measurements are summed up."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.bench.limit import limit_of, work_flops
from flexport.bench.spread import Spread
from flexport.bench.workload import Workload
from flexport.models import known_config, spec_of
from flexport.models.tensors import num_parameters


def work(**changes):
    return Workload(**{"num_prompts": 4, "prompt_len": 8, "gen_len": 3, **changes})


@pytest.fixture
def spec():
    config = known_config("facebook/opt-125m")
    assert config is not None
    return spec_of(config)


@given(st.integers(2, 60000), st.integers(0, 5))
def test_every_prompt_has_its_length_and_tokens_of_the_vocabulary(vocab_size, seed):
    prompts = work(seed=seed).prompts(vocab_size)

    assert [len(prompt) for prompt in prompts] == [8] * 4
    assert all(0 <= token < vocab_size for prompt in prompts for token in prompt)


def test_fewer_prompts_are_the_first_of_more():
    assert work(num_prompts=2).prompts(1000) == work(num_prompts=5).prompts(1000)[:2]


def test_another_seed_makes_other_prompts():
    assert work(seed=0).prompts(1000) != work(seed=1).prompts(1000)


def test_flops_are_about_two_a_parameter_for_each_token(spec):
    # Long prompts and one new token: the head is used once, tables never, attention hardly.
    flops = work_flops(spec, Workload(num_prompts=1, prompt_len=100, gen_len=1))

    without_tables = num_parameters(spec) - spec.vocab_size * spec.embed_size
    assert flops == pytest.approx(2 * without_tables * 100, rel=0.05)


def test_the_head_is_counted_for_sampled_tokens_only(spec):
    one = work_flops(spec, Workload(num_prompts=1, prompt_len=50, gen_len=1))
    # The same passes through the layers, but with one more of them sampled.
    two = work_flops(spec, Workload(num_prompts=1, prompt_len=49, gen_len=2))

    assert two - one == 2 * spec.vocab_size * spec.embed_size


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 50))
def test_flops_grow_in_proportion_to_the_rows(num_prompts, prompt_len, gen_len):
    config = known_config("facebook/opt-125m")
    assert config is not None
    model = spec_of(config)

    one = work_flops(model, Workload(num_prompts=1, prompt_len=prompt_len, gen_len=gen_len))
    many = work_flops(
        model, Workload(num_prompts=num_prompts, prompt_len=prompt_len, gen_len=gen_len)
    )

    assert many == num_prompts * one


@pytest.mark.parametrize(
    ("disk_bytes", "flops", "limit_s", "limited_by"),
    [(200, 10, 2.0, "disk"), (0, 30, 3.0, "compute"), (100, 50, 5.0, "compute")],
)
def test_the_slower_of_disk_and_compute_sets_the_limit(disk_bytes, flops, limit_s, limited_by):
    limit = limit_of(disk_bytes=disk_bytes, flops=flops, disk_bytes_per_s=100, flops_per_s=10)

    assert (limit.limit_s, limit.limited_by) == (limit_s, limited_by)
    assert limit.share(2 * limit_s) == pytest.approx(0.5)


def test_a_spread_has_the_median_and_the_width_over_it():
    spread = Spread.of([10.0, 14.0, 12.0])

    assert (spread.median, spread.values) == (12.0, (10.0, 14.0, 12.0))
    assert spread.spread == pytest.approx(4 / 12)


@given(st.lists(st.floats(0.001, 1e12), min_size=1))
def test_a_spread_survives_the_way_through_plain_data(values):
    spread = Spread.of(values)

    assert Spread.from_dict(asdict(spread)) == spread

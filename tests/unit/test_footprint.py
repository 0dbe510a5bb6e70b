"""What a policy takes: sums that add up, and that grow with what they are sums of."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexport.engine.plan import model_sizes
from flexport.engine.stored import TensorSize
from flexport.models import known_config, spec_of
from flexport.planner.footprint import UNPACKED_BYTES, JobSizes, footprint, layer_splits
from flexport.policy import Policy, Split

MODEL = model_sizes(
    spec_of(known_config("facebook/opt-1.3b") or {}),
    lambda tensor: TensorSize.plain(tensor, 2, 2),
    2,
)
CACHE = MODEL.caches[0]
HALF = CACHE.num_layers // 2
WINDOW = 100
WINDOWED = replace(
    MODEL,
    caches=(
        replace(CACHE, num_layers=CACHE.num_layers - HALF),
        replace(CACHE, num_layers=HALF, window=WINDOW),
    ),
)
"""The same model, half of whose layers see the last hundred tokens."""

JOB = JobSizes(prompt_tokens=128, new_tokens=32)
PAGE_TOKENS = 64
ON_DISK = Split(device=0, disk=1)
ON_HOST = Split(device=0, host=1)


@st.composite
def splits(draw):
    device = draw(st.integers(0, 100))
    host = draw(st.integers(0, 100 - device))
    return Split(device=device / 100, host=host / 100, disk=(100 - device - host) / 100)


@st.composite
def policies(draw, codecs=("none",)):
    codec = draw(st.sampled_from(codecs))
    return Policy(
        weights=draw(splits()),
        cache=draw(splits()),
        activations=draw(splits()),
        batch_size=draw(st.integers(1, 64)),
        num_batches=draw(st.integers(1, 8)),
        prefill_tokens=draw(st.sampled_from([64, 2048])),
        sweep_tokens=draw(st.sampled_from([0, 500] if codec == "none" else [0])),
        compress_cache=codec,
    )


def test_in_memory_it_is_weights_and_cache_and_little_else():
    needs = footprint(MODEL, JOB, Policy(batch_size=64), PAGE_TOKENS, True)

    # The last token has no column, and pages are as wide as what they hold.
    cache_bytes = 64 * 159 * MODEL.cache_token_bytes
    expected = MODEL.weight_bytes + cache_bytes
    assert expected < needs.device_bytes < 1.1 * expected
    assert needs.disk_bytes == needs.host_bytes == 0
    assert needs.staging_bytes == needs.behind_bytes == (0, 0)


def test_on_disk_it_is_two_layers_and_a_slice_of_the_cache():
    policy = Policy(weights=ON_DISK, cache=ON_DISK, batch_size=32)
    needs = footprint(MODEL, JOB, policy, PAGE_TOKENS, True)

    layer_bytes = MODEL.layer_bytes[1]
    assert needs.weights_bytes[0] == 0
    assert needs.device_bytes < MODEL.weight_bytes / 3
    assert needs.staging_bytes[0] > 2 * layer_bytes
    assert needs.disk_bytes >= 32 * 159 * MODEL.cache_token_bytes


@given(policy=policies(), unified=st.booleans())
def test_what_is_asked_for_on_a_tier_is_counted_there(policy, unified):
    needs = footprint(MODEL, JOB, policy, PAGE_TOKENS, unified)

    rows_bytes = policy.block_size * 159 * MODEL.cache_token_bytes
    for tier, share in enumerate(policy.cache.shares()):
        assert needs.cache_bytes[tier] >= 0.999 * share * rows_bytes
    for tier, share in enumerate(policy.weights.shares()):
        assert needs.weights_bytes[tier] >= 0.999 * share * MODEL.weight_bytes
    assert min(needs.device_bytes, needs.host_bytes, needs.disk_bytes) >= 0
    assert needs.host_bytes == 0 or not unified


@given(
    model=st.sampled_from([MODEL, WINDOWED]),
    policy=policies(codecs=("none", "int8", "int4")),
    unified=st.booleans(),
    job=st.builds(JobSizes, prompt_tokens=st.integers(1, 300), new_tokens=st.integers(1, 300)),
)
def test_more_rows_and_longer_ones_never_take_less(model, policy, unified, job):
    def all_bytes(job, policy):
        needs = footprint(model, job, policy, PAGE_TOKENS, unified)
        return needs.device_bytes, needs.host_bytes, needs.disk_bytes

    least = all_bytes(job, policy)
    for more in (
        all_bytes(replace(job, new_tokens=job.new_tokens + 32), policy),
        all_bytes(replace(job, prompt_tokens=job.prompt_tokens + 128), policy),
        all_bytes(job, replace(policy, num_batches=policy.num_batches + 1)),
    ):
        assert all(here <= there for here, there in zip(least, more, strict=True))


@pytest.mark.parametrize("policy", [Policy(batch_size=8), Policy(cache=ON_DISK, batch_size=8)])
def test_a_longer_prompt_takes_no_more_of_a_window(policy):
    """Pages of the window are 16 columns wide, of which each row's part is whole pages of memory."""
    tier = 2 if policy.cache.disk else 0
    taken = {}
    for prompt_tokens in (WINDOW, 1024, 4096):
        job = JobSizes(prompt_tokens=prompt_tokens, new_tokens=200)
        needs = footprint(WINDOWED, job, policy, PAGE_TOKENS, True).cache_bytes[tier]
        full = footprint(MODEL, job, policy, PAGE_TOKENS, True).cache_bytes[tier]
        taken[prompt_tokens] = needs - full / 2

    least_bytes = 8 * HALF * WINDOW * CACHE.token_bytes
    assert len(set(taken.values())) == 1
    assert least_bytes <= taken[WINDOW] <= (1 + 2 * 15 / WINDOW) * least_bytes


def test_heads_that_share_keys_and_values_share_their_bytes():
    config = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 32}
    alone, grouped = (
        model_sizes(
            spec_of({**config, "num_key_value_heads": num_kv_heads}),
            lambda tensor: TensorSize.plain(tensor, 2, 2),
            2,
        )
        for num_kv_heads in (32, 4)
    )
    job = JobSizes(prompt_tokens=1000, new_tokens=1)

    needs = footprint(grouped, job, Policy(batch_size=1), PAGE_TOKENS, True)

    # Keys and values of 4 heads of 128, in 2 bytes each, in 2 layers.
    assert needs.cache_bytes == (1000 * 2 * 4 * 128 * 2 * 2, 0, 0)
    assert 8 * grouped.cache_token_bytes == alone.cache_token_bytes


@given(policy=policies())
def test_what_the_host_can_not_address_takes_staging_on_both_sides_of_the_one_pool(policy):
    shared = footprint(MODEL, JOB, policy, PAGE_TOKENS, True)
    staged = footprint(MODEL, JOB, policy, PAGE_TOKENS, True, addressable=False)

    streams = policy.weights.disk > 0 or policy.cache.disk > 0
    assert staged.staging_bytes == (shared.staging_bytes[0],) * 2
    assert (sum(staged.staging_bytes) > sum(shared.staging_bytes)) == streams
    assert staged.host_bytes == 0
    assert staged.device_bytes >= shared.device_bytes
    assert staged.headroom_bytes == (sum(staged.behind_bytes), 0)


@given(policy=policies(codecs=("none", "int8", "int4")))
def test_a_job_of_fewer_rows_than_a_block_takes_what_its_rows_take(policy):
    short = replace(JOB, num_rows=1)

    needs = footprint(MODEL, short, policy, PAGE_TOKENS, True)

    alone = replace(policy, batch_size=1, num_batches=1)
    assert needs == footprint(MODEL, short, alone, PAGE_TOKENS, True)


@given(split=splits())
def test_layers_have_splits_that_make_the_whole(split):
    sizes = MODEL.layer_bytes

    each = layer_splits(sizes, split)

    total = sum(sizes)
    for tier in range(3):
        found = sum(own.shares()[tier] * size for own, size in zip(each, sizes, strict=True))
        assert found == pytest.approx(split.shares()[tier] * total, rel=1e-6, abs=1e-3 * total)
    assert len(set(each[:-1])) == 1


def test_where_memory_is_one_pool_what_is_on_the_host_needs_no_staging():
    policy = Policy(weights=ON_HOST, cache=ON_HOST, activations=ON_HOST, batch_size=8)

    one_pool = footprint(MODEL, JOB, policy, PAGE_TOKENS, True)
    two_pools = footprint(MODEL, JOB, policy, PAGE_TOKENS, False)

    assert one_pool.staging_bytes == (0, 0)
    assert two_pools.staging_bytes[0] > 0
    assert two_pools.host_bytes >= MODEL.weight_bytes


def test_what_is_exact_counts_in_full_where_the_rest_is_rounded():
    spec = spec_of(known_config("deepseek-ai/DeepSeek-V3") or {})

    def exact(tensor):
        return TensorSize.plain(tensor, 4, 4 if tensor.exact else 2)

    rounded = model_sizes(spec, lambda tensor: TensorSize.plain(tensor, 4, 2), 2)
    slack_bytes = model_sizes(spec, exact, 2).layer_slack_bytes - rounded.layer_slack_bytes

    assert slack_bytes == pytest.approx(2 * (256 * 7168 + 256), rel=0.01)


def test_what_every_piece_of_a_matrix_needs_is_planned_for_once_more_a_cut():
    spec = spec_of(known_config("mistralai/Mixtral-8x7B-v0.1") or {})
    whole_bytes = 1 << 30

    def sizes(whole_bytes: int, num_parts: int):
        def of(tensor):
            plain = TensorSize.plain(tensor, 2, 2)
            return replace(plain, whole_bytes=whole_bytes, num_parts=num_parts)

        return model_sizes(spec, of, 2)

    plain, shared, parted = sizes(0, 1), sizes(whole_bytes, 1), sizes(0, 4)

    assert shared.layer_slack_bytes >= plain.layer_slack_bytes + 2 * whole_bytes
    assert shared.one_expert_bytes >= plain.one_expert_bytes + 2 * whole_bytes
    # A part may begin and end within a page of memory.
    assert parted.layer_slack_bytes >= plain.layer_slack_bytes + 2 * 4096 * 3 * 8 * 3
    assert parted.one_expert_bytes >= plain.one_expert_bytes + 2 * 4096 * 3 * 3


# ---- a cache in 8 or 4 bits

BITS = {"int8": 9, "int4": 4.5}
"""With scales, where heads have 64 features."""


@pytest.mark.parametrize("codec", BITS)
def test_a_packed_cache_takes_its_bits_and_its_newest_tokens_exact(codec):
    policy = Policy(batch_size=64, compress_cache=codec)
    job = JobSizes(prompt_tokens=512, new_tokens=129)

    in_memory = footprint(MODEL, job, policy, PAGE_TOKENS, True).cache_bytes
    spilled = footprint(MODEL, job, replace(policy, cache=ON_DISK), PAGE_TOKENS, True)

    # 512 + 128 columns; the last page of decoded tokens is the newest one to the end.
    token_bytes = 64 * MODEL.cache_token_bytes
    packed_bytes, newest_bytes = BITS[codec] / 16 * (512 + 64) * token_bytes, 64 * token_bytes
    assert in_memory == (packed_bytes + newest_bytes, 0, 0)
    assert spilled.cache_bytes == (0, 0, packed_bytes)
    assert spilled.open_page_bytes == newest_bytes


@given(policy=policies(codecs=("int8", "int4")), unified=st.booleans())
def test_a_packed_cache_counts_the_room_that_it_is_unpacked_in(policy, unified):
    needs = footprint(MODEL, JOB, policy, PAGE_TOKENS, unified)

    row_bytes = (128 + 31) * CACHE.token_bytes
    assert needs.behind_bytes[0] >= min(policy.batch_size * row_bytes, UNPACKED_BYTES)


def test_a_prompt_in_chunks_is_kept_exact_in_one_layer_beside_a_packed_cache():
    job = JobSizes(prompt_tokens=1024, new_tokens=2)
    whole, in_chunks = (
        footprint(
            MODEL,
            job,
            Policy(batch_size=1, prefill_tokens=tokens, compress_cache="int4"),
            PAGE_TOKENS,
            True,
        )
        for tokens in (1024, 256)
    )

    more_bytes = in_chunks.behind_bytes[0] - whole.behind_bytes[0]
    assert more_bytes == 1024 * CACHE.token_bytes

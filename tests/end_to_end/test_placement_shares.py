"""Shares are exact, even over depth, and what moves is what the shares say."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest

import flexport
from flexport import SamplingParams
from flexport.policy import Tier
from flexport.testing.checkpoints import tiny_opt
from flexport.testing.discrete import DiscreteBackend

NUM_LAYERS, NUM_ROWS = 4, 8
PERCENT = [31, 24, 40, 35, 55, 20]
SPLITS = {"weights": PERCENT[:2], "cache": PERCENT[2:4], "activations": PERCENT[4:]}
AMPLE: dict[str, Any] = {
    "device_memory": "256MiB",
    "host_memory": "256MiB",
    "disk_memory": "256MiB",
}

ROW_STEP = 1 / (NUM_LAYERS * NUM_ROWS)
"""A row of one layer's cache is cut no further."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for one row of a matrix to be far below a per cent."""
    return tiny_opt(
        tmp_path_factory.mktemp("wide"),
        num_hidden_layers=NUM_LAYERS,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
    )


def _generate(llm, num_tokens=6, num_rows=NUM_ROWS):
    prompts = [[5 + row] * 30 for row in range(num_rows)]
    return llm.generate(prompts, SamplingParams(max_tokens=num_tokens, ignore_eos=True))


@pytest.mark.parametrize("discrete", [False, True])
def test_realised_shares_are_those_asked_for(model, discrete, nothing_left):
    with closing(DiscreteBackend()) as device:
        backend = device if discrete else "cpu"
        with flexport.LLM(
            model, backend=backend, dtype="float32", percent=PERCENT, batch_size=NUM_ROWS,
            offload_dir=nothing_left, **AMPLE,
        ) as llm:  # fmt: skip
            _generate(llm)
            placement = llm.report["placement"]

    for kind, (on_device, on_host) in SPLITS.items():
        asked = {"device": on_device, "host": on_host, "disk": 100 - on_device - on_host}
        tolerance = 0.5 * ROW_STEP * 100 if kind == "cache" else 1.0
        for tier, share in asked.items():
            assert placement[kind][tier]["share"] * 100 == pytest.approx(share, abs=tolerance)


def test_every_decoder_layer_has_the_same_share_of_weights_in_memory(model, nothing_left):
    with flexport.LLM(
        model, dtype="float32", percent=[60, 0, 100, 0, 100, 0], offload_dir=nothing_left, **AMPLE
    ) as llm:
        _generate(llm)
        assert llm.engine._loaded is not None
        layers = [home.shards for home in llm.engine._loaded.weights._homes[1:-1]]

    shares = []
    for shards in layers:
        near = sum(shard.num_bytes for shard in shards if shard.tier is Tier.DEVICE)
        shares.append(near / sum(shard.num_bytes for shard in shards))
    assert max(shares) - min(shares) < 0.002
    assert 0 < min(shares) < 1


def test_each_sweep_reads_the_streamed_weights_once(model, nothing_left):
    """Whole pages of memory are read, so a layer comes with up to two pages a range too much."""
    moved = {}
    with flexport.LLM(
        model, dtype="float32", percent=[0, 0, 100, 0, 100, 0], batch_size=2, num_batches=4,
        sweep_tokens=0, offload_dir=nothing_left, **AMPLE,
    ) as llm:  # fmt: skip
        for num_tokens in (1, 2, 6):
            _generate(llm, num_tokens)
            moved[num_tokens] = llm.report["moved_bytes"]["disk_to_host"]
        assert llm.plan is not None
        stream_bytes = llm.plan.stream_bytes

    # One sweep for the prompts, and one for each token but the first; looking ahead adds none.
    assert moved[6] - moved[1] == 5 * (moved[2] - moved[1])
    # The tables' few rows come on top.
    assert stream_bytes <= moved[2] - moved[1] <= 1.1 * stream_bytes


def test_fetching_ahead_leaves_room_for_the_caches_of_batches_to_come(model, nothing_left):
    """At exactly the memory that is needed, every sweep takes in what the pace lets in."""
    options: dict[str, Any] = {
        "dtype": "float32", "percent": [0, 0, 100, 0, 100, 0], "batch_size": 16, "num_batches": 4,
        "sweep_tokens": 16 * 30, "offload_dir": nothing_left,
    }  # fmt: skip
    with flexport.LLM(model, **AMPLE, **options) as llm:
        _generate(llm, num_tokens=4, num_rows=128)
        assert llm.plan is not None
        needs_bytes, stream_bytes = llm.plan.needs.device_bytes, llm.plan.stream_bytes

    tight = AMPLE | {"device_memory": needs_bytes, "host_memory": 0}
    with flexport.LLM(model, **tight, **options) as llm:
        _generate(llm, num_tokens=4, num_rows=128)
        moved_bytes = llm.report["moved_bytes"]["disk_to_host"]

    # A batch of 16, whose cache is larger than a layer, joins a sweep, and the last one decodes for three sweeps more.
    num_sweeps = 8 + 3
    assert moved_bytes / stream_bytes == pytest.approx(num_sweeps, rel=0.1)


def test_a_cache_on_disk_is_written_once_and_read_once_a_step(model, nothing_left):
    """A page of the prompt's 30 columns, and pages of 16 for what is decoded: one, and one begun.

    In this model 4 columns of a row make 4096 bytes, to which its part of a page is rounded up.
    """
    column_bytes = NUM_ROWS * 2 * 256 * 4
    with flexport.LLM(
        model, dtype="float32", percent=[100, 0, 0, 0, 100, 0], batch_size=NUM_ROWS,
        offload_dir=nothing_left, **AMPLE,
    ) as llm:  # fmt: skip
        _generate(llm, num_tokens=20)
        moved = llm.report["moved_bytes"]

    # The page that is still growing stays in memory: of 19 steps, 3 read the page of 16.
    written, read = 32 + 16, 19 * 32 + 3 * 16
    assert moved["host_to_disk"] == NUM_LAYERS * written * column_bytes
    table_bytes = 2 * 20 * NUM_ROWS * 256 * 4
    read_bytes = NUM_LAYERS * read * column_bytes
    assert moved["disk_to_host"] == pytest.approx(read_bytes, abs=table_bytes)


def test_on_a_device_with_its_own_memory_resident_weights_cross_the_link_once(model, nothing_left):
    with closing(DiscreteBackend()) as device, flexport.LLM(
        model, backend=device, dtype="float32", percent=[100, 0, 100, 0, 100, 0],
        offload_dir=nothing_left, **AMPLE,
    ) as llm:  # fmt: skip
        _generate(llm, num_tokens=1)
        loaded_bytes = device.moved_bytes("host_to_device")
        _generate(llm, num_tokens=6)
        later_bytes = device.moved_bytes("host_to_device") - loaded_bytes
        weight_bytes = llm.report["placement"]["weights"]["device"]["bytes"]

    assert loaded_bytes >= weight_bytes
    assert later_bytes < 0.01 * weight_bytes

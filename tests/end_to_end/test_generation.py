"""Rows end by themselves, cost nothing after that, and know no neighbours."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing

import pytest

import flexport
from flexport import SamplingParams
from flexport.records import Request
from flexport.testing.discrete import DiscreteBackend

ANYWHERE = [
    {"percent": [100, 0, 100, 0, 100, 0], "batch_size": 10},
    {"percent": [0, 0, 0, 0, 0, 0], "batch_size": 4, "num_batches": 2, "prefill_tokens": 16},
    {"percent": [30, 30, 40, 30, 20, 40], "batch_size": 3, "num_batches": 2, "sweep_tokens": 20},
    {"percent": [0, 100, 0, 100, 0, 100], "batch_size": 1, "num_batches": 3},
]


def _llm(found, backend="cpu", **options):
    return flexport.LLM(
        found.directory,
        backend=backend,
        dtype="float32",
        device_memory="64MiB",
        host_memory="64MiB",
        **options,
    )


@pytest.mark.parametrize("options", ANYWHERE)
@pytest.mark.parametrize("discrete", [False, True])
def test_each_row_ends_at_its_own_end_token(options, discrete, reference, pool_bytes, nothing_left):
    """Rows of one batch end at different steps, so that bands shrink and batches end early."""
    found = reference()
    params, expected = [], []
    for index, ids in enumerate(found.greedy):
        end = ids[(index * 3) % 14]
        params.append(SamplingParams(max_tokens=14, stop_token_ids=(end,), ignore_eos=True))
        expected.append(ids[: ids.index(end) + 1])

    with closing(DiscreteBackend(late=True)) as device:
        backend = device if discrete else "cpu"
        with _llm(found, backend, offload_dir=nothing_left, **options) as llm:
            outputs = llm.generate(found.prompts, params)
            in_use_bytes = pool_bytes(llm)
            llm.generate([found.prompts[0]], SamplingParams(max_tokens=1))
            in_use_later_bytes = pool_bytes(llm)
            work_bytes = llm.plan.needs.work_bytes

    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    assert in_use_bytes[1:] == in_use_later_bytes[1:] or not discrete
    assert in_use_bytes[2] == 0
    assert work_bytes > 0


@pytest.mark.parametrize("options", ANYWHERE)
def test_a_row_gives_the_same_sample_in_whatever_block_it_lands(options, reference):
    found = reference()
    requests = [
        Request(
            request_id=f"row {index}",
            token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=8, temperature=1.3, top_p=0.95, seed=index if index % 2 else None
            ),
        )
        for index, prompt in enumerate(found.prompts)
    ]

    with _llm(found, seed=5, batch_size=1, num_batches=1) as llm:
        alone = {
            done.request.request_id: done.token_ids
            for request in requests
            for done in llm.engine.generate([request])
        }
    with _llm(found, seed=5, **options) as llm:
        together = {
            done.request.request_id: done.token_ids
            for done in llm.engine.generate(reversed(requests))
        }

    assert together == alone
    assert len(set(alone.values())) == len(alone)


def test_another_seed_of_the_run_gives_another_sample(reference):
    found = reference()
    params = SamplingParams(max_tokens=8, temperature=1.3)
    samples = []

    for seed in (0, 1):
        with _llm(found, seed=seed) as llm:
            samples.append([o.outputs[0].token_ids for o in llm.generate(found.prompts, params)])

    assert samples[0] != samples[1]


def test_a_stop_string_ends_a_row_and_is_not_in_its_text(reference):
    found = reference()
    with _llm(found) as llm:
        full = llm.generate([found.prompts[5]], SamplingParams(max_tokens=14, ignore_eos=True))
        text = full[0].outputs[0].text
        stop = text[4:6]
        stopped = llm.generate(
            [found.prompts[5]], SamplingParams(max_tokens=14, ignore_eos=True, stop=(stop,))
        )

    assert stopped[0].outputs[0].text == text[: text.index(stop)]
    assert stopped[0].outputs[0].finish_reason == "stop"


def test_a_row_does_not_end_before_its_least_number_of_tokens(reference):
    found = reference()
    end = found.greedy[5][0]
    ended = SamplingParams(max_tokens=6, stop_token_ids=(end,))
    kept = SamplingParams(max_tokens=6, min_tokens=4, stop_token_ids=(end,))

    with _llm(found) as llm:
        outputs = llm.generate([found.prompts[5]] * 2, [ended, kept])

    assert outputs[0].outputs[0].token_ids == [end]
    assert len(outputs[1].outputs[0].token_ids) >= 4
    assert end not in outputs[1].outputs[0].token_ids[:4]


class _Counting(DiscreteBackend):
    """Counts the rows of the products with each shape of weight."""

    def __init__(self):
        super().__init__()
        self.product_rows = defaultdict(int)

    def matmul(self, x_TD, weight_FD, bias_F=None):
        self.product_rows[tuple(weight_FD.shape)] += x_TD.shape[0]
        return super().matmul(x_TD, weight_FD, bias_F)


@pytest.mark.parametrize("options", ANYWHERE)
def test_each_token_is_computed_once_a_layer_and_a_finished_row_costs_nothing(options, reference):
    found = reference()
    lengths = [1, 14, 2, 9, 3, 1, 14, 5, 2, 7]
    options = {**options, "percent": [100, 0, *options["percent"][2:]]}
    config = found.model.config

    with closing(_Counting()) as device, _llm(found, device, **options) as llm:
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in lengths]
        llm.generate(found.prompts, params)

    prompt_tokens = sum(len(prompt) for prompt in found.prompts)
    # The token that is sampled last is never computed.
    computed = prompt_tokens + sum(lengths) - len(lengths)
    up = (config.ffn_dim, config.hidden_size)
    head = (config.vocab_size, config.hidden_size)
    assert device.product_rows[up] == computed * config.num_hidden_layers
    assert device.product_rows[head] == sum(lengths)


def test_attention_reads_less_once_most_rows_of_a_batch_have_ended(reference):
    found = reference()
    read_bytes = []

    for short in (2, 14):
        with closing(DiscreteBackend()) as device, _llm(found, device, batch_size=5) as llm:
            params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in [14] + [short] * 4]
            llm.generate([found.prompts[4]] * 5, params)
            read_bytes.append(
                sum(call.num_bytes for call in device.calls if call.verb == "attention")
            )

    assert read_bytes[0] < 0.5 * read_bytes[1]


def test_rows_are_taken_as_there_is_room_and_not_before(reference):
    """A block and the look-ahead of packing, and not the whole input."""
    found = reference()
    taken = []

    def endless():
        index = 0
        while True:
            taken.append(index)
            yield Request(
                request_id=str(index), token_ids=(5, 6), sampling=SamplingParams(max_tokens=1)
            )
            index += 1

    with _llm(found, batch_size=4, num_batches=2) as llm:
        completions = llm.engine.generate(endless())
        done = [next(completions) for _ in range(600)]
        completions.close()

    assert len({completion.request.request_id for completion in done}) == 600
    assert len(taken) <= 600 + 3 * 512


def test_no_rows_give_no_completions(reference):
    with _llm(reference()) as llm:
        assert list(llm.engine.generate([])) == []
        assert llm.generate([]) == []

"""Memory that runs out in the middle of a job costs time, and neither rows nor the answer."""

from __future__ import annotations

import contextlib
import errno
import json
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from flexport_emulated.backend import EmulatedBackend
from torch.utils import backend_registration

import flexport
from flexport import SamplingParams
from flexport.cli import main as cli
from flexport.errors import OutOfMemory
from flexport.records import Request
from flexport.registry import open_backend

on_emulated = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

AMPLE: dict[str, Any] = {"device_memory": "1GiB", "host_memory": "1GiB", "disk_memory": "1GiB"}

BLOCKS: list[dict[str, int]] = [
    {"batch_size": 4, "num_batches": 3},
    {"batch_size": 10, "num_batches": 1, "prefill_tokens": 16},
    {"batch_size": 3, "num_batches": 4, "sweep_tokens": 20},
]

MIXES = [[100, 0, 100, 0, 100, 0], [0, 100, 100, 0, 100, 0], [30, 30, 40, 30, 20, 40]]


def options(found, backend, percent, block, offload_dir):
    return {
        "model": found.directory,
        "backend": backend,
        "dtype": "float32",
        "percent": percent,
        "offload_dir": offload_dir,
        **block,
    }


def requests_of(found, **fields):
    sampling = SamplingParams(**{"max_tokens": 14, "ignore_eos": True, **fields})
    return [
        Request(request_id=str(index), token_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(found.prompts)
    ]


def answers(completions):
    """Each row's tokens; every row may come once only."""
    found: dict[int, list[int]] = {}
    for done in completions:
        assert int(done.request.request_id) not in found
        found[int(done.request.request_id)] = list(done.token_ids)
    return found


def rows_of(shape):
    return shape["batch_size"] * shape["num_batches"]


class FailingBackend:
    """The CPU, which raises in place of one of its products."""

    def __init__(self) -> None:
        self._inner = open_backend("cpu")[1]
        self._planned: list[tuple[int, BaseException]] = []
        self.num_products = 0

    def fail_product(self, number: int, error: BaseException) -> None:
        """Raise at a product, once; 0 is the next."""
        self._planned.append((self.num_products + number, error))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def matmul(self, *tensors: Any) -> Any:
        number, self.num_products = self.num_products, self.num_products + 1
        for at, error in self._planned:
            if at == number:
                raise error
        return self._inner.matmul(*tensors)


@on_emulated
@pytest.mark.parametrize(
    ("block", "percent"),
    [(BLOCKS[0], MIXES[1]), (BLOCKS[1], MIXES[0]), (BLOCKS[2], MIXES[2]), (BLOCKS[2], MIXES[0])],
    ids=["lockstep, weights on the host", "chunked", "paced, mixed", "paced"],
)
def test_a_device_smaller_than_the_plan_believes_gives_every_row_its_tokens(
    block, percent, reference, nothing_left
):
    found = reference()
    with contextlib.closing(EmulatedBackend()) as ample:
        with flexport.LLM(**options(found, ample, percent, block, nothing_left), **AMPLE) as llm:
            answers(llm.engine.generate(requests_of(found)))
        peak_bytes = ample.peak_bytes
    used_when_planned_bytes = []

    with contextlib.closing(EmulatedBackend(memory_bytes=int(0.8 * peak_bytes))) as device:
        chosen = options(found, device, percent, block, nothing_left)
        with flexport.LLM(
            **chosen,
            **AMPLE,
            on_plan=lambda _: used_when_planned_bytes.append(device.used_bytes),
        ) as llm:
            ids = answers(llm.engine.generate(requests_of(found)))
            report = llm.report

    assert ids == dict(enumerate(found.greedy))
    retries = report["retries"]
    assert 1 <= len(retries) == len(used_when_planned_bytes) - 1
    # Nothing of the attempt that failed is alive when the next one is planned.
    assert used_when_planned_bytes == [0] * len(used_when_planned_bytes)
    for retry in retries:
        assert "device memory" in retry["reason"]
        assert rows_of(retry["after"]) <= rows_of(retry["before"]) / 2
        assert 1 <= retry["rows_restarted"] <= rows_of(retry["before"])
    assert [retry["before"] for retry in retries[1:]] == [retry["after"] for retry in retries[:-1]]
    last = {name: report["policy"][name] for name in retries[-1]["after"]}
    assert last == retries[-1]["after"]
    assert report["tokens"] == {
        "prompt": sum(map(len, found.prompts)),
        "generated": sum(map(len, found.greedy)),
    }


@on_emulated
@pytest.mark.parametrize("number", [0, 60, 200])
def test_completions_that_were_given_stay_given(number, reference, nothing_left, caplog):
    """Rows are of different lengths, so that some have ended when memory runs out."""
    found = reference()
    lengths = [1, 14, 2, 13, 3, 12, 4, 11, 5, 10]
    requests = [
        Request(
            request_id=str(index),
            token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=length, ignore_eos=True),
        )
        for index, (prompt, length) in enumerate(zip(found.prompts, lengths, strict=True))
    ]
    expected = {index: found.continued(index, length) for index, length in enumerate(lengths)}

    with contextlib.closing(EmulatedBackend()) as device:
        chosen = options(found, device, MIXES[2], BLOCKS[0], nothing_left)
        with flexport.LLM(**chosen, **AMPLE) as llm:
            list(llm.engine.generate(requests[:1]))
            device.fail_kernel(number, OutOfMemory("a workspace of 8 GiB found no room"))
            ids = answers(llm.engine.generate(iter(requests)))
            retries = llm.report["retries"]

    assert ids == expected
    assert [rows_of(retry["after"]) for retry in retries] == [4]
    assert (retries[0]["rows_restarted"] < 10) == (number == 200)
    warning = "out of memory: a workspace of 8 GiB found no room; going on with 1 x 4 rows"
    assert warning in caplog.text


@pytest.mark.parametrize("number", [5, 70])
@pytest.mark.parametrize(
    "error",
    [
        OutOfMemory("no room"),
        torch.OutOfMemoryError("Tried to allocate 2 GiB"),
        RuntimeError("XYZ backend out of memory (XYZ allocated: 7 GB, max allowed: 9 GB)"),
        RuntimeError("XYBLAS_STATUS_ALLOC_FAILED when calling `create(handle)`"),
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:5]}",
)
def test_however_a_library_says_it_the_job_goes_on(error, number, reference, nothing_left):
    found, device = reference(), FailingBackend()

    chosen = options(found, device, MIXES[2], BLOCKS[0], nothing_left)
    with contextlib.closing(device), flexport.LLM(**chosen, **AMPLE) as llm:
        device.fail_product(number, error)
        ids = answers(llm.engine.generate(requests_of(found)))
        num_retries = len(llm.report["retries"])

    assert ids == dict(enumerate(found.greedy))
    assert num_retries == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError("no such device")])
def test_other_errors_end_the_job(error, reference, nothing_left):
    found, device = reference(), FailingBackend()

    chosen = options(found, device, MIXES[2], BLOCKS[0], nothing_left)
    with contextlib.closing(device), flexport.LLM(**chosen, **AMPLE) as llm:
        device.fail_product(20, error)
        with pytest.raises(type(error), match=str(error)):
            list(llm.engine.generate(requests_of(found)))


@pytest.mark.parametrize("block", BLOCKS, ids=["lockstep", "chunked", "paced"])
def test_samples_and_scores_are_those_of_an_undisturbed_run(block, reference, nothing_left):
    found = reference()
    requests = requests_of(found, temperature=1.2, top_p=0.95, repetition_penalty=1.2)
    pairs = [(prompt, ids[:4]) for prompt, ids in zip(found.prompts, found.greedy, strict=True)]
    runs = []

    for failures in ((), (40, 150), (90, 100)):
        device = FailingBackend()
        chosen = options(found, device, MIXES[2], block, nothing_left)
        with contextlib.closing(device), flexport.LLM(**chosen, **AMPLE, seed=3) as llm:
            for number in failures:
                device.fail_product(number, OutOfMemory("no room"))
            ids = answers(llm.engine.generate(requests))
            retries = len(llm.report["retries"])
            for number in failures[:1]:
                device.fail_product(number // 2, OutOfMemory("no room"))
            scores = llm.score(pairs)
            runs.append((ids, scores, retries, len(llm.report["retries"])))

    undisturbed, *disturbed = runs
    assert undisturbed[2:] == (0, 0)
    for ids, scores, *num_retries in disturbed:
        assert num_retries == [2, 1]
        assert ids == undisturbed[0]
        assert scores == pytest.approx(undisturbed[1], abs=1e-4)


def test_when_one_row_finds_no_room_the_user_is_told_and_the_next_job_runs(reference, nothing_left):
    found, device = reference(), FailingBackend()
    block = {"batch_size": 2, "num_batches": 2}

    chosen = options(found, device, MIXES[2], block, nothing_left)
    with contextlib.closing(device), flexport.LLM(**chosen, **AMPLE) as llm:
        for number in (30, 60, 90):
            device.fail_product(number, OutOfMemory("asked for 9 bytes, 7 are free"))
        with pytest.raises(OutOfMemory, match="9 bytes, 7 are free; one row at a time") as raised:
            list(llm.engine.generate(requests_of(found)))
        left_open = [t.name for t in threading.enumerate() if t.name.startswith("flexport ")]
        files_left = list(nothing_left.iterdir())
        ids = answers(llm.engine.generate(requests_of(found)))
        retries = llm.report["retries"]

    assert "--device-memory" in str(raised.value)
    assert left_open == files_left == retries == []
    assert ids == dict(enumerate(found.greedy))


def test_memory_that_runs_out_while_weights_load_ends_the_job_at_once(
    reference, nothing_left, monkeypatch
):
    found, device = reference(), FailingBackend()

    def pack(weight: object) -> None:
        raise RuntimeError("XYZ out of memory")

    monkeypatch.setattr(FailingBackend, "pack", staticmethod(pack), raising=False)
    chosen = options(found, device, MIXES[0], BLOCKS[0], nothing_left)
    with (
        contextlib.closing(device),
        flexport.LLM(**chosen, **AMPLE) as llm,
        pytest.raises(OutOfMemory, match="XYZ out of memory; this was while weights were loaded"),
    ):
        list(llm.engine.generate(requests_of(found)))


@pytest.mark.parametrize("error", [OutOfMemory("of a nested engine"), MemoryError("too long")])
def test_memory_that_runs_out_in_the_input_is_the_inputs(error, reference, nothing_left):
    found = reference()

    def lines():
        for number in range(60):  # more than the 512 rows that are read at once
            for request in requests_of(found, max_tokens=2):
                yield Request(
                    request_id=f"{number}-{request.request_id}",
                    token_ids=request.token_ids,
                    sampling=request.sampling,
                )
        raise error

    chosen = options(found, "cpu", MIXES[0], BLOCKS[0], nothing_left)
    with flexport.LLM(**chosen, **AMPLE) as llm, pytest.raises(type(error)) as raised:
        list(llm.engine.generate(lines()))

    assert raised.value is error


def test_a_long_job_is_read_once_and_only_as_far_as_it_is_under_way(reference, nothing_left):
    found, device = reference(), FailingBackend()
    num_rows, in_flight, most = 700, 0, 0

    def lines():
        nonlocal in_flight, most
        for number in range(num_rows):
            in_flight += 1
            most = max(most, in_flight)
            yield Request(
                request_id=str(number),
                token_ids=tuple(found.prompts[number % 10]),
                sampling=SamplingParams(max_tokens=1 + number % 2, ignore_eos=True),
            )

    chosen = options(found, device, MIXES[0], BLOCKS[2], nothing_left)
    counts: Counter[int] = Counter()
    with contextlib.closing(device), flexport.LLM(**chosen, **AMPLE) as llm:
        for done in llm.engine.generate(lines()):
            in_flight -= 1
            number = int(done.request.request_id)
            counts[number] += 1
            assert list(done.token_ids) == found.continued(number % 10, 1 + number % 2)
            if number in (300, 600):
                device.fail_product(3, OutOfMemory("no room"))
        num_retries = len(llm.report["retries"])

    assert num_retries == 2
    assert counts == Counter(range(num_rows))
    # A window of 512 rows is looked at to be packed, and the next one opens as the last of it run.
    assert most < 600


def test_later_jobs_begin_with_the_smaller_block_and_larger_ones_with_what_was_asked(
    reference, nothing_left
):
    found, device = reference(), FailingBackend()
    plans: list[tuple[int, int]] = []
    policy = flexport.Policy(batch_size=5, num_batches=2)

    with (
        contextlib.closing(device),
        flexport.LLM(
            found.directory,
            backend=device,
            dtype="float32",
            policy=policy,
            device_memory="3MiB",
            offload_dir=nothing_left,
            on_plan=lambda plan: plans.append((plan.policy.num_batches, plan.policy.batch_size)),
        ) as llm,
    ):
        device.fail_product(40, OutOfMemory("no room"))
        short = [
            request for request in requests_of(found, max_tokens=2) if int(request.request_id) < 6
        ]
        first = answers(llm.engine.generate(short))
        second = answers(llm.engine.generate(short))
        retries = llm.report["retries"]
        third = answers(llm.engine.generate(requests_of(found)))

    assert first == second == {index: found.continued(index, 2) for index in range(6)}
    assert third == dict(enumerate(found.greedy))
    assert retries == []
    assert plans == [(2, 5), (1, 5), (2, 5)]


@on_emulated
def test_a_batch_job_that_meets_it_and_is_resumed_has_every_row_once(
    reference, tmp_path, nothing_left, monkeypatch, caplog
):
    found = reference()
    source, output, report = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "report.json"))
    lines = [
        json.dumps({"id": f"row {number}", "prompt_token_ids": prompt, "max_tokens": 1 + number})
        for number, prompt in enumerate(found.prompts)
    ]
    # As a run that was killed left it: three rows, and a torn line.
    source.write_text("\n".join(lines[:3]))
    command = ["run", "-i", source, "-o", output, "--model", found.directory, "--dtype", "float32"]
    command += ["--offload-dir", nothing_left, "--ignore-eos", "--report", report]
    command += ["--percent", 100, 0, 100, 0, 100, 0, "--batch-size", 4, "--num-batches", 2]
    small = [*command, "--device-memory", "64MiB", "--resume"]
    assert cli.main(list(map(str, command))) == 0
    with output.open("a") as file:
        file.write('{"id": "row 3", "tok')
    source.write_text("\n".join(lines))
    device = EmulatedBackend(memory_bytes=1_300_000)
    monkeypatch.setattr("flexport.engine.engine.open_backend", lambda _: ("emulated", device))

    code = cli.main(list(map(str, small)))

    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert code == 0
    assert Counter(row["id"] for row in rows) == Counter(f"row {number}" for number in range(10))
    for row in rows:
        number = int(row["id"].split()[1])
        assert row["token_ids"] == found.continued(number, 1 + number)
    assert json.loads(report.read_text())["retries"]
    assert "going on with 1 x 4 rows in place of 2 x 4" in caplog.text

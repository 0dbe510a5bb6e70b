"""What goes wrong in any lane reaches the caller, and nothing is left behind."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import closing
from typing import Any

import pytest

import flexport
from flexport import SamplingParams
from flexport.errors import DiskFull, StorageError, UsageError
from flexport.records import Request
from flexport.store.direct_io import DirectFile
from flexport.testing.discrete import DiscreteBackend

ALL_ON_DISK: dict[str, Any] = {"percent": [0, 0, 0, 0, 0, 0], "batch_size": 3, "num_batches": 2}
MIXED: dict[str, Any] = {"percent": [30, 30, 40, 30, 20, 40], "batch_size": 3, "num_batches": 2}


def _llm(found, offload_dir, backend="cpu", **options):
    return flexport.LLM(
        found.directory,
        backend=backend,
        dtype="float32",
        device_memory="64MiB",
        host_memory="64MiB",
        offload_dir=offload_dir,
        **options,
    )


def _requests(found, max_tokens=14):
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return [
        Request(request_id=str(index), token_ids=tuple(prompt), sampling=sampling)
        for index, prompt in enumerate(found.prompts)
    ]


def _complete_into(completed, completions):
    for done in completions:
        completed[int(done.request.request_id)] = list(done.token_ids)


def _completed(completions):
    completed: dict[int, list[int]] = {}
    _complete_into(completed, completions)
    return completed


class _Failing:
    """Makes the n-th call from now on fail, once or for good; any thread's calls count."""

    def __init__(self, monkeypatch, owner, name, error, for_good=False):
        self._real = getattr(owner, name)
        self._error = error
        self._for_good = for_good
        self._lock = threading.Lock()
        self._left = -1
        monkeypatch.setattr(owner, name, lambda *args: self._call(*args))

    def after(self, num_calls):
        with self._lock:
            self._left = num_calls

    def _call(self, *args):
        with self._lock:
            fails = self._left == 0
            if self._left > 0 or (fails and not self._for_good):
                self._left -= 1
        if fails:
            raise self._error
        return self._real(*args)


@pytest.mark.parametrize("num_calls", [0, 1, 7, 40, 150])
@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("method", ["_read_some", "_write_some"])
def test_a_disk_error_in_mid_run_is_raised_and_the_engine_can_go_on(
    num_calls, discrete, method, reference, monkeypatch, nothing_left
):
    found = reference()
    failing = _Failing(monkeypatch, DirectFile, method, OSError(errno.EIO, "the disk is dying"))

    with (
        closing(DiscreteBackend()) as device,
        _llm(found, nothing_left, device if discrete else "cpu", **ALL_ON_DISK) as llm,
    ):
        failing.after(num_calls)
        completed: dict[int, list[int]] = {}
        with pytest.raises(StorageError, match="the disk is dying"):
            _complete_into(completed, llm.engine.generate(_requests(found)))
        left_open = [t.name for t in threading.enumerate() if t.name.startswith("flexport")]
        files_left = list(nothing_left.iterdir())
        again = _completed(llm.engine.generate(_requests(found)))

    assert left_open == []
    assert files_left == []
    assert all(found.greedy[index] == ids for index, ids in completed.items())
    assert again == dict(enumerate(found.greedy))


def test_a_checkpoint_cut_short_in_mid_run_is_a_storage_error(reference, tmp_path, nothing_left):
    found = reference()
    directory = tmp_path / "model"
    shutil.copytree(found.directory, directory)

    with flexport.LLM(
        directory, dtype="float32", device_memory="64MiB", offload_dir=nothing_left, **ALL_ON_DISK
    ) as llm:
        completions = llm.engine.generate(_requests(found))
        next(completions)
        for file in directory.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(StorageError, match="truncated"):
            list(completions)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space is allocated otherwise")
def test_a_disk_that_fills_up_ends_the_run_and_keeps_the_rows_that_are_done(
    reference, monkeypatch, nothing_left
):
    found = reference()
    failing = _Failing(
        monkeypatch, os, "posix_fallocate", OSError(errno.ENOSPC, "No space left"), for_good=True
    )
    requests = _requests(found)
    short = [
        Request(
            request_id=request.request_id,
            token_ids=request.token_ids,
            sampling=SamplingParams(max_tokens=1 + 6 * (index % 2), ignore_eos=True),
        )
        for index, request in enumerate(requests)
    ]

    with _llm(found, nothing_left, **ALL_ON_DISK) as llm:
        failing.after(2)
        completed: dict[int, list[int]] = {}
        with pytest.raises(DiskFull, match="offload-dir"):
            _complete_into(completed, llm.engine.generate(short))
        files_left = list(nothing_left.iterdir())

    assert files_left == []
    assert all(found.greedy[index][: len(ids)] == ids for index, ids in completed.items())


@pytest.mark.parametrize("options", [ALL_ON_DISK, MIXED])
@pytest.mark.parametrize("discrete", [False, True])
def test_a_job_that_is_left_early_holds_nothing_and_the_next_one_is_right(
    options, discrete, reference, pool_bytes, nothing_left
):
    found = reference()

    with (
        closing(DiscreteBackend(late=True)) as device,
        _llm(found, nothing_left, device if discrete else "cpu", **options) as llm,
    ):
        list(llm.engine.generate(_requests(found)))
        in_use_bytes = pool_bytes(llm)
        for num_rows in (1, 2, 5):
            completions = llm.engine.generate(_requests(found, max_tokens=9))
            for _ in range(num_rows):
                next(completions)
            completions.close()
        completed = _completed(llm.engine.generate(_requests(found)))
        in_use_later_bytes = pool_bytes(llm)

    assert completed == dict(enumerate(found.greedy))
    assert in_use_later_bytes == in_use_bytes


@pytest.mark.parametrize("error", [ValueError("a bad line"), KeyboardInterrupt()])
def test_an_error_of_the_input_comes_through_and_the_next_job_is_right(
    error, reference, nothing_left
):
    found = reference()

    def lazily():
        for round_ in range(60):
            for request in _requests(found, max_tokens=2):
                yield Request(
                    request_id=f"{round_} {request.request_id}",
                    token_ids=request.token_ids,
                    sampling=request.sampling,
                )
        raise error

    with _llm(found, nothing_left, percent=[50, 0, 50, 0, 50, 0], batch_size=10) as llm:
        with pytest.raises(type(error)):
            list(llm.engine.generate(lazily()))
        completed = _completed(llm.engine.generate(_requests(found)))

    assert completed == dict(enumerate(found.greedy))


def test_an_interrupt_between_visits_leaves_nothing(reference, monkeypatch, nothing_left):
    found = reference()
    compute = _Failing(monkeypatch, flexport.engine.work.JobWork, "compute", KeyboardInterrupt())

    with _llm(found, nothing_left, **MIXED) as llm:
        compute.after(30)
        with pytest.raises(KeyboardInterrupt):
            list(llm.engine.generate(_requests(found)))
        files_left = list(nothing_left.iterdir())
        completed = _completed(llm.engine.generate(_requests(found)))

    assert files_left == []
    assert completed == dict(enumerate(found.greedy))


def test_two_jobs_at_once_are_refused(reference, nothing_left):
    found = reference()

    with _llm(found, nothing_left, **MIXED) as llm:
        first = llm.engine.generate(_requests(found))
        next(first)
        with pytest.raises(UsageError, match="another job is under way"):
            next(llm.engine.generate(_requests(found)))
        with pytest.raises(UsageError, match="another job is under way"):
            llm.score([([5], [6])])
        rest = list(first)

    assert len(rest) == len(found.prompts) - 1


def test_an_engine_closed_under_a_job_can_be_left(reference, nothing_left):
    found = reference()
    llm = _llm(found, nothing_left, **ALL_ON_DISK)
    completions = llm.engine.generate(_requests(found))
    next(completions)

    llm.close()
    completions.close()
    llm.close()

    assert list(nothing_left.iterdir()) == []

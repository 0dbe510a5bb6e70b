"""An error in any lane, at any moment of a job: the caller hears of it at once, and nothing is left."""

from __future__ import annotations

import errno
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any, Literal
from unittest import mock

import pytest
from flexport_emulated.backend import EmulatedBackend
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch.utils import backend_registration

import flexport
from flexport import SamplingParams
from flexport.engine.attempts import forget
from flexport.errors import StorageError
from flexport.records import Request
from flexport.store.direct_io import DirectFile

pytestmark = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)

Place = Literal["host_to_device", "device_to_host", "compute", "_read_some", "_write_some"]
"""A lane of the device, or a disk's reads or writes."""

PLACES: tuple[Place, ...] = (
    "host_to_device",
    "device_to_host",
    "compute",
    "_read_some",
    "_write_some",
)

PERCENT = [30, 30, 40, 30, 20, 40]

BLOCKS: list[dict[str, Any]] = [
    {"batch_size": 3, "num_batches": 2, "cpu_attention": "off"},
    {"batch_size": 3, "num_batches": 2, "cpu_attention": "on"},
    {"batch_size": 2, "num_batches": 4, "prefill_tokens": 16, "sweep_tokens": 20},
]

PATIENCE_S = 1.0
"""From an error to its caller: what is under way may end, and a busy machine may be slow."""


class Broken(OSError):
    """Made when it is raised, so that it knows when that was."""

    raised_s: float | None = None

    def __init__(self) -> None:
        super().__init__(errno.EIO, "it broke")
        type(self).raised_s = time.monotonic()


def requests_of(found):
    lengths = [14, 3, 9, 14, 1, 7, 14, 2, 11, 5]
    return [
        Request(
            request_id=str(index),
            token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=length, ignore_eos=True),
        )
        for index, (prompt, length) in enumerate(zip(found.prompts, lengths, strict=True))
    ]


def llm_on(device, found, block, offload_dir):
    return flexport.LLM(
        found.directory,
        backend=device,
        dtype="float32",
        percent=PERCENT,
        device_memory="64MiB",
        host_memory="64MiB",
        offload_dir=offload_dir,
        **block,
    )


class Calls:
    """Counts calls of a disk's method, in any thread; one of them may fail."""

    def __init__(self, method: str, failing: int | None) -> None:
        self.count = 0
        self._real = getattr(DirectFile, method)
        self._failing = failing
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> int:
        with self._lock:
            number, self.count = self.count, self.count + 1
        if number == self._failing:
            raise Broken
        moved: int = self._real(*arguments)
        return moved


@contextmanager
def counted(
    device: EmulatedBackend, place: Place, failing: int | None = None
) -> Iterator[Callable[[], int]]:
    """How often something was begun in a place; if it is not None, one of these fails."""
    if place == "_read_some" or place == "_write_some":
        calls = Calls(place, failing)
        # A function, so that a file is its first argument.
        with mock.patch.object(DirectFile, place, lambda *arguments: calls(*arguments)):
            yield lambda: calls.count
        return
    if failing is not None and place == "compute":
        device.fail_kernel(failing, Broken)
    elif failing is not None and place != "compute":
        device.fail_copy(place, failing, Broken)
    yield lambda: device.num_begun(place)


def run(llm: flexport.LLM, found: Any, completed: dict[int, list[int]]) -> BaseException | None:
    """Run a job as far as it goes; what ended it, without the frames that it went through."""
    try:
        for done in llm.engine.generate(requests_of(found)):
            completed[int(done.request.request_id)] = list(done.token_ids)
    except (OSError, StorageError) as error:
        forget(error)
        return error
    return None


@pytest.fixture(scope="module")
def undisturbed(
    reference: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], dict[Place, int]]:
    """undisturbed(number of a block): how often a job begins something in each place."""
    made: dict[int, dict[Place, int]] = {}

    def get(number: int) -> dict[Place, int]:
        if number not in made:
            found, offload_dir = reference(), tmp_path_factory.mktemp("undisturbed")
            with closing(EmulatedBackend()) as device, ExitStack() as stack:
                counts = {place: stack.enter_context(counted(device, place)) for place in PLACES}
                with llm_on(device, found, BLOCKS[number], offload_dir) as llm:
                    assert run(llm, found, {}) is None
                made[number] = {place: count() for place, count in counts.items()}
        return made[number]

    return get


@pytest.mark.parametrize("place", PLACES)
@settings(
    max_examples=int(os.environ.get("FLEXPORT_TEST_EXAMPLES", "2")),
    phases=(Phase.generate,),  # an example takes seconds, and a smaller one says no more
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(share=st.floats(0, 1.1), number=st.integers(0, len(BLOCKS) - 1))
def test_an_error_at_any_moment_is_told_at_once_and_nothing_is_left(
    share, number, place, reference, undisturbed, nothing_left
):
    """`share` is how far the job is when it meets the error; past its end it never does."""
    found = reference()
    expected = {
        int(request.request_id): found.continued(
            int(request.request_id), request.sampling.max_tokens
        )
        for request in requests_of(found)
    }
    failing = int(share * undisturbed(number)[place])
    Broken.raised_s = None
    completed: dict[int, list[int]] = {}

    with (
        closing(EmulatedBackend()) as device,
        llm_on(device, found, BLOCKS[number], nothing_left) as llm,
    ):
        with counted(device, place, failing):
            error = run(llm, found, completed)
            heard_s = time.monotonic()
        left_open = [t.name for t in threading.enumerate() if t.name.startswith("flexport ")]
        files_left = list(nothing_left.iterdir())
        gc.collect()
        left_bytes = device.used_bytes
        again: dict[int, list[int]] = {}
        if error is not None:
            assert run(llm, found, again) is None

    if Broken.raised_s is None:
        assert share > 0.9, "a job begins about as much every time"
        assert error is None
        assert completed == expected
        return
    assert error is not None
    assert heard_s - Broken.raised_s < PATIENCE_S
    assert completed.items() <= expected.items()
    assert left_open == []
    assert files_left == []
    assert left_bytes == 0
    assert again == expected

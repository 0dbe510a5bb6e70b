"""What the planner counts is what the engine does: its visits, and the bytes of every lane."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import pytest
from flexport_emulated.backend import EmulatedBackend
from torch.utils import backend_registration

import flexport
from flexport import SamplingParams
from flexport.engine.rehearsal import _Stage, rehearse
from flexport.engine.work import JobWork
from flexport.planner.predict import predict
from flexport.policy import Policy, Split
from flexport.testing.checkpoints import tiny_opt
from flexport.testing.discrete import DiscreteBackend

HOST, DISK = Split(device=0, host=1), Split(device=0, disk=1)
MIXED = Split(device=0.25, host=0.25, disk=0.5)
AMPLE: dict[str, Any] = dict.fromkeys(("device_memory", "host_memory", "disk_memory"), "512MiB")

ROWS = {
    "alike": [(64, 18)] * 8,
    "ragged": [(16 + 7 * row, 4 + 2 * row) for row in reversed(range(8))],
}
"""Rows of (prompt tokens, new tokens)."""

POLICIES = {
    "weights on disk": Policy(weights=DISK, batch_size=4, num_batches=2),
    "weights everywhere": Policy(weights=MIXED, batch_size=4, num_batches=2),
    "weights packed": Policy(weights=DISK, compress_weights="int8", batch_size=8),
    "cache on disk": Policy(cache=DISK, batch_size=4, num_batches=2),
    "cache on the host": Policy(cache=HOST, batch_size=4, num_batches=2),
    "cache everywhere": Policy(cache=MIXED, batch_size=4, num_batches=2),
    "cache packed": Policy(cache=DISK, compress_cache="int8", batch_size=8),
    "prompts in chunks": Policy(cache=DISK, prefill_tokens=24, batch_size=4, num_batches=2),
    "states everywhere": Policy(activations=MIXED, batch_size=4, num_batches=2),
    "block after block": Policy(weights=DISK, cache=HOST, batch_size=2, num_batches=2),
    "paced": Policy(weights=DISK, cache=HOST, batch_size=2, num_batches=4, sweep_tokens=128),
}
ON_CPU = {
    "attention of the host's": Policy(cache=HOST, cpu_attention=True, batch_size=4, num_batches=2),
    "attention of the disk's": Policy(cache=DISK, cpu_attention=True, batch_size=4, num_batches=2),
    "projections": Policy(weights=HOST, cpu_projections=True, batch_size=4, num_batches=2),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A column of a row's cache takes 2 KiB, so that pages of 16 are whole grains."""
    return tiny_opt(
        tmp_path_factory.mktemp("wide"),
        num_hidden_layers=3,
        hidden_size=256,
        word_embed_proj_dim=256,
        ffn_dim=1024,
        max_position_embeddings=512,
    )


def run(model, backend, policy, rows, offload_dir):
    """The engine's report, and what its plan's costs foretell: in rehearsal and in a closed form."""
    with flexport.LLM(
        model, backend=backend, dtype="float32", policy=policy, offload_dir=offload_dir, **AMPLE
    ) as llm:
        llm.generate(
            [[5 + index] * prompt for index, (prompt, _) in enumerate(rows)],
            [SamplingParams(max_tokens=new, ignore_eos=True) for _, new in rows],
        )
        size = policy.batch_size
        batches = [rows[begin : begin + size] for begin in range(0, len(rows), size)]
        assert llm.plan is not None
        costs = llm.engine._planning.costs(llm.plan.job, policy)
        return llm.report, rehearse(costs, batches, 1 << 40), predict(costs)


def check(moved, report, policy, what):
    """Each lane within 2 per cent; but weights come in whole grains, and tables' rows on top."""
    for lane, num_bytes in report["moved_bytes"].items():
        if policy.compress_weights != "none" and lane in ("disk_to_host", "host_to_device"):
            bound = 0.1  # parts of small matrices, each of which begins and ends within a grain
        else:
            bound = 0.02
        assert moved[lane] == pytest.approx(num_bytes, rel=bound, abs=1), (what, lane)


CASES = [
    (name, discrete, rows)
    for name in (*POLICIES, *ON_CPU)
    for discrete in (False, True)
    for rows in ("alike", "ragged")
    # There is no CPU beside the CPU; and ragged rows that are dealt to tiers are no two alike.
    if (discrete or name not in ON_CPU) and (name, rows) != ("cache everywhere", "ragged")
]


@pytest.mark.parametrize(("name", "discrete", "rows"), CASES)
def test_the_bytes_of_a_run_are_those_of_its_rehearsal(name, discrete, rows, model, nothing_left):
    policy = (POLICIES | ON_CPU)[name]
    with closing(DiscreteBackend()) as device:
        backend = device if discrete else "cpu"
        report, rehearsed, closed = run(model, backend, policy, ROWS[rows], nothing_left)

    check(rehearsed.moved_bytes, report, policy, "rehearsal")
    assert rehearsed.new_tokens == report["tokens"]["generated"]
    # The closed form does not know that a batch of the next block begins a sweep before the others.
    if rows == "alike" and name not in ("block after block", "paced"):
        check(closed.moved_bytes, report, policy, "closed form")
        assert closed.new_tokens == report["tokens"]["generated"]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
@pytest.mark.parametrize("name", ["cache on disk", "weights everywhere", "projections"])
def test_so_they_are_on_an_accelerator(name, model, nothing_left):
    policy = (POLICIES | ON_CPU)[name]
    with closing(EmulatedBackend()) as device:
        report, rehearsed, _ = run(model, device, policy, ROWS["ragged"], nothing_left)

    check(rehearsed.moved_bytes, report, policy, "rehearsal")


@pytest.mark.parametrize("rows", list(ROWS))
@pytest.mark.parametrize("name", ["block after block", "prompts in chunks", "paced"])
def test_the_visits_of_a_run_are_those_of_its_rehearsal(
    name, rows, model, nothing_left, monkeypatch
):
    """So is what they compute, which follows from their tokens."""
    diaries: dict[Any, list[Any]] = {JobWork: [], _Stage: []}
    for kind, diary in diaries.items():
        compute = kind.compute

        def watched(self, visit, compute=compute, diary=diary):
            diary.append(visit)
            compute(self, visit)

        monkeypatch.setattr(kind, "compute", watched)

    run(model, "cpu", POLICIES[name], ROWS[rows], nothing_left)

    assert diaries[JobWork] == diaries[_Stage]

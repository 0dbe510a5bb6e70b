"""The grid that the chosen policy is judged by, and how it is judged. Nothing is run here."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flexport.bench import cases
from flexport.bench import grid as grids
from flexport.bench.cases import Case
from flexport.bench.grid import Setting, grid, judge
from flexport.planner.shipped import shipped
from flexport.policy import Budgets, Policy, Split

CASE = Case(
    name="a job", model="facebook/opt-125m", dtype="float32", rows=40, prompt=(8, 40), new=6
)
PLENTY = Budgets(device_bytes=10**12, host_bytes=10**12, disk_bytes=10**12)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def task(directory):
    return grids._task(Setting(case=CASE, device_memory="400MiB"), "cpu", directory)


def test_a_case_is_the_same_rows_for_every_model():
    lengths = [len(ids) for ids in CASE.prompts(50)]

    assert lengths == [len(ids) for ids in CASE.prompts(5000)] == CASE.lengths
    assert CASE.job.mean_prompt == sum(lengths) / 40
    assert CASE.job.prompt_tokens == max(lengths) <= 40


def test_all_of_the_grid_fits_and_nothing_leaves_room_for_its_next_step(task):
    policies = grid(task)

    assert len({policy.block_size for policy in policies}) > 1
    assert any(policy.cache.disk for policy in policies)
    for policy in policies:
        assert task.fits(policy)
        for name, step in (("weights", 1 / 4), ("cache", 1 / 2)):
            share = getattr(policy, name).device + step
            if share <= 1:
                more: dict[str, Any] = {name: Split(device=share, disk=1 - share)}
                assert not task.fits(replace(policy, **more)), (policy, more)


def test_with_ample_memory_only_the_shapes_of_blocks_are_left(task):
    policies = grid(replace(task, budgets=PLENTY))

    assert {(each.weights, each.cache) for each in policies} == {(Split(), Split())}
    assert len(policies) == len(set(policies)) > 2


def test_beside_a_device_the_grid_has_the_cpu_attend_only_to_what_is_away(task):
    budgets = replace(PLENTY, device_bytes=300 << 20)
    policies = grid(replace(task, machine=shipped("t4"), budgets=budgets))

    assert {policy.cpu_attention for policy in policies} == {False, True}
    for policy in policies:
        assert policy.weights.disk == policy.cache.disk == 0
        assert policy.cache.host > 0 or not policy.cpu_attention


def test_each_policy_is_judged_by_its_neighbours_and_the_best_by_their_medians(
    directory, monkeypatch
):
    """On a machine that becomes slower and slower, a policy is no worse for coming late."""
    speed, runs = {"now": 1.0}, list[Policy]()

    def rate_of(policy: Policy) -> int:
        return 300 - policy.block_size

    def ran(case, backend, folder):
        assert (backend, folder) == ("cpu", directory)
        policy = case.settings["policy"]
        runs.append(policy)
        speed["now"] *= 0.99
        return None, [{"throughput": {"generation_tok_s": speed["now"] * rate_of(policy)}}]

    monkeypatch.setattr(grids, "ran", ran)
    setting = Setting(case=CASE, device_memory="400MiB")

    chosen, *others = judge(setting, "cpu", directory, 3)

    tried, final = others[: -1 - grids.FINALISTS], others[-1 - grids.FINALISTS :]
    assert runs[0] == chosen.policy
    assert [found.policy for found in tried] == grid(grids._task(setting, "cpu", directory))
    for found in (*tried, *final):
        expected = rate_of(found.policy) / rate_of(chosen.policy)
        assert found.of_chosen == pytest.approx(expected, rel=0.04)
    assert final[0].policy == chosen.policy
    assert final[0].of_chosen == 1
    best = sorted((found.of_chosen for found in tried), reverse=True)[: grids.FINALISTS]
    assert [found.of_chosen for found in final[1:]] == pytest.approx(best, rel=0.05)
    assert len(runs) == 1 + len(tried) + -(-len(tried) // grids.EVERY) + 3 * len(final)


def test_a_table_has_the_chosen_policy_first_and_the_best_next(directory, monkeypatch):
    def ran(case, backend, folder):
        rate = 10.0 + case.settings["policy"].block_size
        return None, [{"throughput": {"generation_tok_s": rate}}]

    monkeypatch.setattr(grids, "ran", ran)
    setting = Setting(case=CASE, device_memory="400MiB")
    results = list(judge(setting, "cpu", directory, 1))

    table = grids._table(setting, results)

    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert rows[1].startswith(f"| {grids._described(results[0].policy)} |")
    shown = [float(row.split("|")[4]) for row in rows[2 : -1 - grids.FINALISTS - 1]]
    assert shown == sorted(shown, reverse=True)
    assert "the best of them in turn" in table


def test_what_a_policy_is_called():
    policy = Policy(
        batch_size=8,
        num_batches=4,
        sweep_tokens=30,
        weights=Split(device=0.25, disk=0.75),
        cache=Split(device=0.5, host=0.5),
        cpu_attention=True,
    )

    assert grids._described(policy) == (
        "4 x 8 paced, 75 % of weights on disk, 50 % of cache on host, CPU attends"
    )
    assert grids._described(Policy(batch_size=2)) == "1 x 2"


def test_settings_of_a_device_are_asked_for_by_its_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        cases,
        "open_backend",
        lambda name: (
            "card",
            SimpleNamespace(capabilities=SimpleNamespace(unified=False), close=lambda: None),
        ),
    )
    judged: list[Setting] = []

    def judge(setting, *_rest):
        judged.append(setting)
        return iter(())

    monkeypatch.setattr(grids, "judge", judge)

    grids.main(["--backend", "card", "--json", "--dir", str(tmp_path)])

    assert tuple(judged) == grids.BESIDE_SETTINGS
    assert capsys.readouterr().out == ""

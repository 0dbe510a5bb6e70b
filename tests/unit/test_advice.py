"""What a run that has ended is told: only what is true of it, and what would help."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from flexport.engine.advice import LONG_S, OFF, warnings
from flexport.engine.comparison import comparison, comparison_table, lane_table
from flexport.planner.predict import Prediction

GIB = 1 << 30


def split(device: float, host: float, disk: float) -> dict[str, float]:
    return {"device": device, "host": host, "disk": disk}


def placed(device: float, host: float, disk: float) -> dict[str, dict[str, float]]:
    return {name: {"bytes": share * GIB} for name, share in split(device, host, disk).items()}


def report(
    *,
    compute_s: float = 90.0,
    wait_s: float = 10.0,
    read_s: float = 60.0,
    up_s: float = 0.0,
    peak: float = 3.9,
    unified: bool = True,
    weights: tuple[float, float, float] = (0.4, 0, 0.6),
    cache: tuple[float, float, float] = (1, 0, 0),
    codec: str = "none",
    predicted_s: float = 100.0,
) -> dict[str, Any]:
    """Of a run that computed and waited so long, with 4 GiB of memory; by default a good one."""
    lanes = {"disk_to_host": read_s, "host_to_device": up_s}
    predicted = Prediction(
        prefill_s=0.1 * predicted_s,
        decode_s=0.9 * predicted_s,
        load_s=1.0,
        new_tokens=1000,
        busy_s={"compute": compute_s, **lanes},
        moved_bytes={"disk_to_host": 5 * GIB, "host_to_device": 0.0},
    )
    found: dict[str, Any] = {
        "policy": {
            "weights": split(*weights),
            "cache": split(*cache),
            "batch_size": 16,
            "num_batches": 2,
            "compress_weights": codec,
            "compress_cache": codec,
        },
        "plan": {
            "budgets": {"device_bytes": 4 * GIB, "host_bytes": 0 if unified else 8 * GIB},
            "needs": {"device_bytes": peak * GIB, "host_bytes": 0 if unified else 8 * GIB},
            "unified": unified,
        },
        "placement": {"weights": placed(*weights), "cache": placed(*cache)},
        "peak_bytes": {"device": 0.5 * GIB, "host": 0},
        "rows": 64,
        "seconds": {"load": 1.0, "prefill": 0.0, "decode": compute_s + wait_s, "total": 102.0},
        "busy_seconds": {"compute": compute_s, "host_compute": 0.0, **lanes},
        "moved_bytes": {"disk_to_host": 5 * GIB},
        "wait_seconds": {"compute": wait_s},
        "throughput": {"generation_tok_s": 10.0},
    }
    return found | {"comparison": comparison(predicted, found)}


def told(found: dict[str, Any], **changed: Any) -> list[str]:
    return warnings(found, **{"numbers": "measured", "asked": True, "packed": False, **changed})


@pytest.mark.parametrize(
    "found",
    [
        report(),
        report(weights=(1, 0, 0), read_s=0, wait_s=0, peak=0.2),
        report(weights=(0.5, 0.5, 0), unified=False, read_s=0, up_s=60),
        report(weights=(0, 0, 1), compute_s=60, wait_s=40, read_s=99),
        report(predicted_s=125.0),
        report(predicted_s=80.0),
    ],
    ids=["streams", "in memory", "beside a device", "reads all along", "was quicker", "was slower"],
)
def test_a_run_in_which_nothing_is_amiss_is_told_nothing(found):
    assert told(found) == []
    assert told(found, numbers="typical", asked=False) == []


def test_a_short_run_is_told_nothing_whatever_it_was():
    def run(seconds):
        return report(compute_s=0.2 * seconds, wait_s=0.8 * seconds, weights=(0, 0, 1), peak=0.1)

    numbers = [len(told(run(seconds))) for seconds in (1.01 * LONG_S, 0.99 * LONG_S)]

    assert numbers == [3, 0]


def test_memory_that_was_not_used_while_weights_were_away_is_told_of():
    found = report(compute_s=70, wait_s=30, peak=2.0)

    (text,) = told(found)

    assert text.startswith("2.00 GiB of the 4.00 GiB of device memory were never used")
    assert "614.40 MiB of weights" in text
    assert "--percent" in text


@pytest.mark.parametrize(
    ("changed", "options"),
    [
        ({"peak": 3.5}, {}),  # what is left is too little
        ({"wait_s": 5.0, "compute_s": 95.0}, {}),  # it would not be quicker
        ({"weights": (1, 0, 0)}, {}),  # there is nothing to put there
        ({}, {"asked": False}),  # the plan had its reasons
    ],
    ids=["used", "no wait", "nothing away", "not asked for"],
)
def test_memory_that_would_help_nobody_is_not_told_of(changed, options):
    found = report(**{"compute_s": 70, "wait_s": 30, "peak": 2.0, **changed})

    assert told(found, **options) == []


def test_of_a_device_beside_a_host_each_tier_is_told_of_by_what_is_below_it():
    found = report(
        unified=False, compute_s=70, wait_s=30, peak=2.0, weights=(0.2, 0.8, 0), cache=(0, 0, 1)
    )
    found["plan"]["needs"]["host_bytes"] = GIB

    texts = told(found)

    assert "819.20 MiB of weights and 1.00 GiB of KV cache came from further away" in texts[0]
    assert "of host memory" in texts[1]
    assert "while 1.00 GiB of KV cache came" in texts[1]


@pytest.mark.parametrize(
    ("changed", "expected", "absent"),
    [
        ({}, ["reading from disk", "--compress-weights", "--num-batches"], ["--compress-cache"]),
        ({"codec": "int8"}, ["--device-memory"], ["--compress-weights"]),
        (
            {"weights": (1, 0, 0), "cache": (0, 0, 1)},
            ["--compress-cache", "a smaller block"],
            ["--compress-weights", "a larger block"],
        ),
        (
            {"unified": False, "read_s": 0.0, "up_s": 95.0, "weights": (0, 1, 0)},
            ["copying to the device", "--compress-weights"],
            ["from disk"],
        ),
    ],
    ids=["weights", "packed weights", "cache", "link"],
)
def test_waiting_most_of_the_time_is_told_of_with_what_would_shorten_it(changed, expected, absent):
    found = report(**{"compute_s": 20, "wait_s": 80, "read_s": 95, **changed})

    (text,) = told(found)

    assert text.startswith("computing waited for 80 % of the time")
    assert all(words in text for words in expected)
    assert not [words for words in absent if words in text]


def test_packed_checkpoints_are_not_advised_to_be_compressed_and_full_blocks_not_to_grow():
    found = report(compute_s=20, wait_s=80)
    found["rows"] = 32

    (text,) = told(found, packed=True)

    assert "--compress-weights" not in text
    assert "--num-batches" not in text


@pytest.mark.parametrize("predicted_s", [100 / OFF / 1.01, 100 * OFF * 1.01])
def test_a_prediction_that_was_off_is_told_of_by_whose_numbers_it_was_made(predicted_s):
    found = report(predicted_s=predicted_s)

    (typical,) = told(found, numbers="typical")
    (measured,) = told(found, numbers="measured")

    assert "typical machine's numbers; `flexport profile` measures this one" in typical
    assert "something else may have used the machine" in measured


def test_predicted_and_measured_have_one_shape():
    compared = report(predicted_s=50.0)["comparison"]

    assert set(compared["predicted"]) == set(compared["measured"])
    assert set(compared["predicted"]["seconds"]) == set(compared["measured"]["seconds"])
    assert compared["ratio"] == pytest.approx(2.0)
    assert compared["measured"]["limited_by"] == "compute"


def test_the_table_has_a_line_for_each_lane_that_did_something():
    table = comparison_table(report(compute_s=25.0, wait_s=75.0, read_s=90.0)["comparison"])

    lines = {line[:20].strip(): line.split() for line in table.splitlines()}
    assert lines["waiting for copies"][-2:] == ["75", "%"]
    assert lines["reading from disk"][-2:] == ["90", "%"]
    assert "copying to the device" not in table


def test_the_table_of_a_plan_shows_what_lanes_move():
    predicted = Prediction(
        prefill_s=10.0, decode_s=30.0, load_s=0.0, new_tokens=4,
        busy_s={"compute": 10.0, "disk_to_host": 40.0}, moved_bytes={"disk_to_host": 3.0 * GIB},
    )  # fmt: skip

    lines = [line.split() for line in lane_table(predicted).splitlines()]

    assert lines[1][-3:] == ["s", "25", "%"]
    assert lines[2] == ["reading", "from", "disk", "40.0", "s", "100", "%", "3.00", "GiB"]


def test_judging_leaves_the_report_alone():
    found = report(compute_s=20, wait_s=80)
    before = deepcopy(found)

    told(found)

    assert found == before

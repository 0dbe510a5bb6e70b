"""How well copies hide behind computing, on the emulated accelerator: `python overlap.py`.

Rates are chosen so that moving what a decode sweep needs takes half as long as computing it, as
long, and twice as long. Perfect overlap takes as long as the longest lane, a schedule that only
does one thing after another as the sum of all. The time of every lane is slept, so the figures
hardly depend on the machine, as long as it is not busy.
"""

from __future__ import annotations

import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Literal

import flexport
from flexport.testing.checkpoints import tiny_opt

sys.path.insert(0, str(Path(__file__).parent))

from flexport_emulated.backend import EmulatedBackend

HIDDEN = 256
NUM_LAYERS = 8
ROWS = 16
NEW_TOKENS = 6
LAYER_S = 0.12
"""Seconds that a layer computes in a decode step: long beside the 4 ms of Python that each visit
takes, most of it the emulated device's own; the launches of a real one take a fraction of that."""

LAYER_VALUES = 12 * HIDDEN * HIDDEN
FLOPS_PER_S = 2 * ROWS * LAYER_VALUES / LAYER_S

CASES: dict[str, list[float]] = {
    "weights on the host": [0, 100, 100, 0, 100, 0],
    "weights on disk": [0, 0, 100, 0, 100, 0],
    "weights and cache on the host": [0, 100, 0, 100, 100, 0],
    "half of the weights on the host": [50, 50, 100, 0, 100, 0],
}
RATIOS = (0.5, 1.0, 2.0)
LANES: tuple[Literal["compute", "host_to_device", "device_to_host"], ...] = (
    "compute",
    "host_to_device",
    "device_to_host",
)


def measure(
    model: Path, percent: list[float], ratio: float, num_batches: int
) -> tuple[float, list[float]]:
    """Seconds of the whole job and of each lane."""
    streamed = 1 - percent[0] / 100
    link_bytes_per_s = 4 * LAYER_VALUES * streamed / (LAYER_S * ratio)
    weights, cache, activations = flexport.Policy.splits_from_percent(percent)
    policy = flexport.Policy(
        weights=weights,
        cache=cache,
        activations=activations,
        batch_size=ROWS // num_batches,
        num_batches=num_batches,
    )
    device = EmulatedBackend(link_bytes_per_s=link_bytes_per_s, flops_per_s=FLOPS_PER_S)
    with (
        closing(device),
        flexport.LLM(
            model,
            backend=device,
            dtype="float32",
            policy=policy,
            host_memory="1GiB",
        ) as llm,
    ):
        sampling = flexport.SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)
        llm.generate([[5]] * ROWS, sampling)  # loads, and warms up
        before = {lane: device.busy_s(lane) for lane in LANES}
        llm.generate([[5]] * ROWS, sampling)
        seconds = {lane: device.busy_s(lane) - before[lane] for lane in LANES}
        took = llm.report["seconds"]
    return took["prefill"] + took["decode"], list(seconds.values())


def main() -> None:
    """Measure every case and print a table."""
    print(f"{'':34}{'moving':>8}{'compute':>9}{'up':>8}{'down':>8}{'wall':>8}{'wall/longest':>14}")
    with tempfile.TemporaryDirectory() as directory:
        model = tiny_opt(
            Path(directory),
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=4 * HIDDEN,
            num_hidden_layers=NUM_LAYERS,
        )
        for name, percent in CASES.items():
            for num_batches in (1, 4):
                for ratio in RATIOS:
                    wall_s, lanes_s = measure(model, percent, ratio, num_batches)
                    lanes = "".join(f"{seconds:8.2f}" for seconds in lanes_s)
                    print(
                        f"{name + ', ' + str(num_batches) + ' x ' + str(ROWS // num_batches):34}"
                        f"{ratio:7.1f}x {lanes}{wall_s:8.2f}{wall_s / max(lanes_s):14.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()

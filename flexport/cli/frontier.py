"""The latency-throughput frontier as a table, as CSV, and as a picture."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from flexport.cli.table import columns
from flexport.planner.search import Point
from flexport.policy import Policy, Split
from flexport.units import format_seconds, format_tok_s

__all__ = ["as_csv", "as_svg", "as_table"]

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 440, 80, 40, 60, 60

_PICTURE = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}">
<style>
text {{ font: 12px sans-serif }} .rows {{ fill: #666; font-size: 11px }} .grid {{ stroke: #ddd }}
polyline {{ fill: none; stroke: #0b63b5; stroke-width: 2 }} circle {{ fill: #0b63b5 }}
</style>
<rect width="{width}" height="{height}" fill="#fff"/>
<text x="{left}" y="24" style="font-size: 15px">{title}</text>
<text x="{left}" y="42" class="rows">numbers are rows in flight</text>
{parts}
<text x="{centre}" y="{low}" text-anchor="middle">latency of a block, seconds</text>
<text transform="translate(20 {middle}) rotate(-90)" text-anchor="middle">generated tokens a second</text>
</svg>
"""


def as_table(points: Sequence[Point]) -> str:
    """A line for each plan, for a person to read."""
    rows: list[tuple[str, ...]] = [
        ("LATENCY", "GENERATED", "ROWS", "WEIGHTS", "KV CACHE", "ACTIVATIONS")
    ]
    for latency_s, tok_s, policy in points:
        rows.append(
            (
                format_seconds(latency_s),
                format_tok_s(tok_s),
                _shape(policy),
                *(_shares(each) for each in (policy.weights, policy.cache, policy.activations)),
            )
        )
    about = "Latency is from a block's first prompt to its last token; shares are device/host/disk, in %."
    return "\n".join([*columns(rows, num_words=0), "", about])


def as_csv(points: Sequence[Point]) -> str:
    """The same for programs: all fields of each policy, shares as `weights.device` and so on."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for index, (latency_s, tok_s, policy) in enumerate(points):
        fields = {"latency_s": latency_s, "tok_s": tok_s, **_flat(policy.to_dict())}
        if index == 0:
            writer.writerow(fields)
        writer.writerow(fields.values())
    return text.getvalue()


def as_svg(points: Sequence[Point], title: str) -> str:
    """A picture, both axes logarithmic: a factor is as wide anywhere."""
    xs, ys = [each[0] for each in points], [each[1] for each in points]
    x_ticks, y_ticks = _ticks(xs), _ticks(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return (
            round(LEFT + _along(x, x_ticks) * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - _along(y, y_ticks) * (HEIGHT - TOP - BOTTOM), 1),
        )

    bottom, top = y_ticks[0], y_ticks[-1]
    left, right = x_ticks[0], x_ticks[-1]
    parts = []
    for tick in x_ticks:
        (x, low), (_, high) = at(tick, bottom), at(tick, top)
        parts.append(f'<path class="grid" d="M{x} {low}V{high}"/>')
        parts.append(f'<text x="{x}" y="{low + 20}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y_ticks:
        (x, y), (end, _) = at(left, tick), at(right, tick)
        parts.append(f'<path class="grid" d="M{x} {y}H{end}"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    places = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    parts.append(f'<polyline points="{" ".join(f"{x},{y}" for x, y in places)}"/>')
    for (x, y), (latency_s, tok_s, policy) in zip(places, points, strict=True):
        told = f"{_shape(policy)} rows: {format_tok_s(tok_s)} after {format_seconds(latency_s)}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="4"><title>{told}</title></circle>')
        parts.append(f'<text class="rows" x="{x + 7}" y="{y + 14}">{policy.block_size}</text>')
    return _PICTURE.format(
        width=WIDTH,
        height=HEIGHT,
        left=LEFT,
        centre=(LEFT + WIDTH - RIGHT) / 2,
        middle=(TOP + HEIGHT - BOTTOM) / 2,
        low=HEIGHT - 14,
        title=escape(title),
        parts="\n".join(parts),
    )


def _ticks(values: Sequence[float]) -> list[float]:
    """1, 2 and 5 times powers of ten, from below the least value to above the largest."""
    low = math.floor(math.log10(min(values)))
    steps = [factor * 10.0**power for power in range(low, low + 30) for factor in (1, 2, 5)]
    first = max(step for step in steps if step <= min(values))
    last = min(step for step in steps if step > max(values))
    return [step for step in steps if first <= step <= last]


def _along(value: float, ticks: Sequence[float]) -> float:
    return math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])


def _number(value: float) -> str:
    return f"{value:.12g}"


def _shape(policy: Policy) -> str:
    return f"{policy.num_batches} x {policy.batch_size}"


def _shares(split: Split) -> str:
    return "/".join(f"{100 * share:.0f}" for share in split.shares())


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}.{part}": of for part, of in value.items()}
        else:
            flat[name] = value
    return flat

"""A run's plan: the policy in force, what it takes, and how it reads to a person."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from flexport.codecs.plane import BITS, Plane
from flexport.engine.comparison import LANES
from flexport.engine.machines import Numbers
from flexport.engine.stored import TensorSize
from flexport.models.spec import Attention, Experts, LatentAttention, Layer, ModelSpec
from flexport.models.tensors import (
    TensorSpec,
    is_projection,
    layer_tensors,
    owned_tensors,
)
from flexport.planner.columns import GROUP_TOKENS
from flexport.planner.footprint import (
    CUT_ROWS,
    GRAIN_BYTES,
    Footprint,
    JobSizes,
    LayerCaches,
    ModelSizes,
)
from flexport.planner.machine import Machine
from flexport.planner.predict import Prediction
from flexport.policy import Budgets, Policy, Split, Tier
from flexport.units import format_bytes, format_seconds, format_tok_s

__all__ = ["Plan", "cache_bits", "cache_planes", "layer_caches", "model_sizes"]


def model_sizes(
    spec: ModelSpec, size: Callable[[TensorSpec], TensorSize], item_bytes: int
) -> ModelSizes:
    """The planner's numbers of a model whose tensors have these sizes."""
    layers = [
        [(tensor, size(tensor)) for tensor in owned_tensors(spec, layer)]
        for layer in range(spec.num_schedule_layers)
    ]
    expert_bytes, one_expert_bytes = [], 0
    table_bytes = slack_bytes = packed_bytes = expert_packed_bytes = 0
    ratio = 0.0
    for own in layers:
        disk_bytes = sum(each.disk_bytes for _, each in own)
        if disk_bytes:
            ratio = max(ratio, sum(each.near_bytes for _, each in own) / disk_bytes)
        by_expert: dict[int, list[TensorSize]] = {}
        for tensor, each in own:
            if tensor.expert is not None:
                by_expert.setdefault(tensor.expert, []).append(each)
        expert_bytes.append(sum(each.disk_bytes for of in by_expert.values() for each in of))
        for of_expert in by_expert.values():
            # Each tensor may begin and end within a grain, on either of two tiers.
            num_parts = sum(each.num_parts for each in of_expert)
            edges_bytes = 4 * GRAIN_BYTES * (2 * num_parts + 1)
            again_bytes = CUT_ROWS * max(each.whole_bytes for each in of_expert)
            one_expert_bytes = max(
                one_expert_bytes,
                sum(each.disk_bytes for each in of_expert) + edges_bytes + again_bytes,
            )
            expert_packed_bytes = max(expert_packed_bytes, _scratch_bytes(of_expert))
        dense = [each for tensor, each in own if tensor.expert is None]
        packed_bytes = max(packed_bytes, _scratch_bytes(dense))
        table_bytes += sum(each.disk_bytes for tensor, each in own if tensor.kind == "table")
        widest = max(
            (_cut_bytes(tensor, each) for tensor, each in own),
            default=0,
        )
        # Each part of a tensor may begin and end within a grain, and two cuts make two more parts.
        num_parts = sum(each.num_parts for _, each in own)
        slack_bytes = max(slack_bytes, 2 * GRAIN_BYTES * (num_parts + 2) + CUT_ROWS * widest)
    slack_bytes += max(_exact_excess_bytes(own, ratio) for own in layers)
    projections = _projection_values(spec)
    return ModelSizes(
        layer_bytes=tuple(sum(each.disk_bytes for _, each in own) for own in layers),
        layer_slack_bytes=slack_bytes,
        table_bytes=table_bytes,
        expert_bytes=tuple(expert_bytes),
        one_expert_bytes=one_expert_bytes,
        experts_picked=max(
            (
                layer.mlp.top_k / layer.mlp.num_experts
                for layer in spec.layers
                if isinstance(layer.mlp, Experts)
            ),
            default=0.0,
        ),
        decoded_ratio=ratio,
        packed_scratch_bytes=packed_bytes,
        expert_scratch_bytes=expert_packed_bytes,
        caches=_caches(spec, item_bytes),
        hidden_token_bytes=spec.hidden_size * item_bytes,
        work_token_bytes=max(_work_values(spec, layer) for layer in set(spec.layers)) * item_bytes,
        # The product, its float32 copy, and one more for sampling.
        head_token_bytes=spec.vocab_size * (item_bytes + 8),
        # Scores and their softmax, in float32.
        score_bytes=max(layer.attention.num_heads for layer in spec.layers) * 8,
        crossing_token_bytes=max(_crossing_values(layer.attention) for layer in spec.layers)
        * item_bytes,
        projection_bytes=sum(
            each.disk_bytes for own in layers for tensor, each in own if is_projection(tensor)
        ),
        projection_values=projections,
        max_positions=spec.max_positions,
    )


def _exact_excess_bytes(own: Sequence[tuple[TensorSpec, TensorSize]], ratio: float) -> int:
    """What a layer's exact tensors may take near the device beyond what all take on average."""
    return math.ceil(
        sum(max(0.0, each.near_bytes - ratio * each.disk_bytes) for t, each in own if t.exact)
    )


def _cut_bytes(tensor: TensorSpec, size: TensorSize) -> int:
    """What lies between two places where a tensor can be cut, and what a cut doubles."""
    pieces = size.num_cuts or tensor.shape[0]
    return max(size.disk_bytes, size.near_bytes) // pieces + size.whole_bytes


def _scratch_bytes(sizes: Sequence[TensorSize]) -> int:
    """What the numbers of packed tensors take, in whole grains of memory."""
    return sum(
        each.scratch_bytes + GRAIN_BYTES * (1 + CUT_ROWS) for each in sizes if each.scratch_bytes
    )


def cache_planes(attention: Attention | LatentAttention, codec: str) -> tuple[Plane, ...]:
    """What a layer's cache is packed in: keys along tokens and values along features.

    Where keys are values, too, they are packed like these.
    """
    along: tuple[Literal["tokens", "features"], ...] = ("tokens", "features")
    return tuple(
        Plane(
            num_heads=attention.cache_heads,
            head_dim=attention.cache_dim,
            bits=BITS[codec],
            along=each,
        )
        for each in along[-attention.cache_planes :]
    )


def cache_bits(spec: ModelSpec, codec: str, item_bytes: int) -> float:
    """What a value of the cache takes on average, scales included; the newest tokens take more."""
    if codec == "none":
        return 8 * item_bytes
    planes = [plane for layer in spec.layers for plane in cache_planes(layer.attention, codec)]
    num_values = sum(GROUP_TOKENS * plane.num_heads * plane.head_dim for plane in planes)
    return 8 * sum(plane.num_bytes(GROUP_TOKENS) for plane in planes) / num_values


def _caches(spec: ModelSpec, item_bytes: int) -> tuple[LayerCaches, ...]:
    counts = Counter(layer_caches(layer.attention, item_bytes) for layer in spec.layers)
    return tuple(replace(alike, num_layers=count) for alike, count in counts.items())


def layer_caches(attention: Attention | LatentAttention, item_bytes: int) -> LayerCaches:
    """The cache of one layer; those of alike layers are equal."""
    return LayerCaches(
        num_layers=1,
        plane_token_bytes=attention.cache_heads * attention.cache_dim * item_bytes,
        num_planes=attention.cache_planes,
        window=attention.window,
        packings=tuple(
            (codec, tuple(p.num_bytes(GROUP_TOKENS) for p in cache_planes(attention, codec)))
            for codec in BITS
        ),
    )


def _crossing_values(attention: Attention | LatentAttention) -> int:
    """Queries and results of one token, and what is new in the cache."""
    new = attention.cache_planes * attention.cache_heads * attention.cache_dim
    return 2 * attention.query_size + new


def _work_values(spec: ModelSpec, layer: Layer) -> int:
    """The more of a layer's two peaks: attention (norm, q, k, v, output), MLP (norm, up, down)."""
    attention, mlp = layer.attention, layer.mlp
    attending = spec.hidden_size + _crossing_values(attention)
    if isinstance(attention, Attention) and attention.rope is not None:
        attending += attention.query_size  # the parts of a turn, before they are put together
    if isinstance(attention, Attention) and attention.head_norm is not None:
        attending += 2 * attention.query_size  # queries in float32, and what their norm makes
    if isinstance(attention, LatentAttention):
        attending += 2 * attention.query_size + attention.out_size
    if isinstance(mlp, Experts):
        # Expert by expert, with copies of the tokens; at worst one expert takes them all. What each
        # made of a token waits for the others.
        shared = mlp.shared.size if mlp.shared is not None else 0
        width = max(mlp.mlp.size, shared) * 3 + (mlp.top_k + 3) * spec.hidden_size
    else:
        width = (3 if mlp.gated else 2) * mlp.size
    beside = spec.hidden_size * (3 if layer.norms != "input" or layer.parallel != "no" else 1)
    # A norm by its mean square is worked out in float32.
    wide_norm = 4 * spec.hidden_size if spec.norm.kind == "rms" else 0
    return max(beside + attending, beside + width, beside + wide_norm)


def _projection_values(spec: ModelSpec) -> int:
    """Values of all matrices that hidden states are multiplied with first."""
    return sum(
        tensor.num_values
        for layer in range(1, spec.head_layer)
        for tensor in layer_tensors(spec, layer)
        if is_projection(tensor)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run will do, said before it starts."""

    model: str
    backend: str
    dtype: str
    dtype_reason: str
    policy: Policy
    job: JobSizes
    needs: Footprint
    predicted: Prediction
    """What the job takes, if it is like the rows that were looked at."""
    machine: Machine
    """By whose numbers."""
    numbers: Numbers
    budgets: Budgets
    page_tokens: int
    stream_bytes: int
    """Weights that every sweep reads from disk."""
    compression: Mapping[str, Any]
    """Of "weights", what `engine.compression` says; of "cache" the codec, and the bits of a value but
    for the newest tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "policy": self.policy.to_dict(),
            "job": asdict(self.job),
            "budgets": asdict(self.budgets),
            "unified": self.needs.unified,
            "needs": {
                "device_bytes": self.needs.device_bytes,
                "host_bytes": self.needs.host_bytes,
                "disk_bytes": self.needs.disk_bytes,
            },
            "predicted": self.predicted.to_dict(),
            "page_tokens": self.page_tokens,
            "stream_bytes_per_sweep": self.stream_bytes,
            "compression": dict(self.compression),
        }

    def describe(self) -> str:
        """The plan for a person to read."""
        needs, policy = self.needs, self.policy
        shown = [tier for tier in Tier if not (needs.unified and tier is Tier.HOST)]
        names = {
            Tier.DEVICE: "memory" if needs.unified else "device",
            Tier.HOST: "host",
            Tier.DISK: "disk",
        }
        rows = [["", *(names[tier] for tier in shown)]]
        for name, split in (
            ("weights", policy.weights),
            ("KV cache", policy.cache),
            ("activations", policy.activations),
        ):
            rows.append([name, *(_percent(split, tier, needs.unified) for tier in shown)])
        taken = {
            Tier.DEVICE: (needs.device_bytes, self._memory_bytes),
            Tier.HOST: (needs.host_bytes, self.budgets.host_bytes),
            Tier.DISK: (needs.disk_bytes, self.budgets.disk_bytes),
        }
        rows.append(["needs", *(format_bytes(taken[tier][0]) for tier in shown)])
        rows.append(["of a budget of", *(format_bytes(taken[tier][1]) for tier in shown)])
        streams = (
            f", {format_bytes(self.stream_bytes)} of weights read from disk each sweep"
            if self.stream_bytes
            else ""
        )
        pace = f", {policy.sweep_tokens} prompt tokens a sweep" if policy.sweep_tokens else ""
        shape = f"{policy.num_batches} x {policy.batch_size}"
        on_cpu = [
            name
            for name, is_on in (
                ("attention over the cache away from the device", policy.cpu_attention),
                ("projections with host weights", policy.cpu_projections),
            )
            if is_on
        ]
        beside = [f"  decode steps use the CPU for {' and '.join(on_cpu)}"] if on_cpu else []
        share = 100 * policy.attn_sparsity
        told = f"  decode steps add up the values of {share:.3g} % of the tokens that they see"
        sparse = [told] if policy.attn_sparsity < 1 else []
        return "\n".join(
            [
                f"plan: {self.model} on {self.backend} in {self.dtype} ({self.dtype_reason})",
                *_table(rows),
                f"  {shape} rows share each sweep over the weights{streams}{pace}",
                *_compressed(self.compression),
                *beside,
                *sparse,
                *_predicted(self.predicted, self.job, policy.block_size),
                f"  {_whose(self.machine, self.numbers)}",
            ]
        )

    @property
    def _memory_bytes(self) -> int:
        host_bytes = self.budgets.host_bytes if self.needs.unified else 0
        return self.budgets.device_bytes + host_bytes


def _compressed(compression: Mapping[str, Any]) -> list[str]:
    weights, cache = compression["weights"], compression["cache"]
    lines = []
    if weights["codec"] != "none":
        left = ", ".join(slot.removesuffix(".weight") for slot in list(weights["left"])[:3])
        share, bits = 100 * weights["share"], weights["bits"]
        told = f"{share:.1f} % of the weights in {weights['codec']}, {bits:.2f} bits each"
        lines.append(f"  {told}; {left} and smaller ones as they are")
    if cache["codec"] != "none":
        lines.append(f"  KV cache in {cache['codec']}, {cache['bits']:.3g} bits a value")
    return lines


def _predicted(predicted: Prediction, job: JobSizes, block_size: int) -> list[str]:
    load_s, run_s = predicted.load_s, predicted.run_s
    lengths = f"of {job.mean_prompt:.0f} tokens and {job.mean_new:.0f} new ones"
    took = (
        f"{format_seconds(run_s)} for each block of {_rows(block_size)} {lengths}"
        if job.num_rows is None
        else f"{format_seconds(run_s)} for {_rows(job.num_rows)} {lengths}"
    )
    busy_s, lane = predicted.busy_s[predicted.limited_by], predicted.limited_by
    share = f"{100 * busy_s / run_s:.0f} %" if run_s else "0 %"
    return [
        f"  predicted: {format_tok_s(predicted.tok_s)}, {took}, after {format_seconds(load_s)} of loading",
        f"  {LANES[lane]} limits it, busy for {share} of that time",
    ]


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _whose(machine: Machine, numbers: Numbers) -> str:
    if numbers == "measured":
        return "by the numbers that `flexport profile` measured on this machine"
    if numbers == "typical":
        return (
            f"by the numbers of {machine.name}, which this machine is taken for; `flexport profile` "
            "measures its own"
        )
    return f"by the numbers of {machine.name}"


def _percent(split: Split, tier: Tier, unified: bool) -> str:
    share = split.share(tier)
    if unified and tier is Tier.DEVICE:
        share += split.host
    return f"{100 * share:.1f} %"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  " + row[0].ljust(widths[0]) + "".join(
            "  " + cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)
        )
        for row in rows
    ]  # fmt: skip

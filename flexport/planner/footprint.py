"""How many bytes a policy takes on each tier, at most.

The same sums decide which policy is chosen, whether a policy is refused before the first byte
moves, and how much of each tier the engine sets aside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from flexport.planner.columns import (
    GROUP_TOKENS,
    PROMPT_PAGE_TOKENS,
    SPILL_PAGE_TOKENS,
    edges_of,
    most_kept,
    page_sizes,
    page_widths,
)
from flexport.policy import Policy, Split

__all__ = [
    "HEAD_TOKENS",
    "UNPACKED_BYTES",
    "Footprint",
    "JobSizes",
    "LayerCaches",
    "ModelSizes",
    "expert_window_bytes",
    "footprint",
    "layer_splits",
    "page_tokens_for",
]

STATES_AHEAD = 2
"""Visits whose states are fetched while another one is computed. A disk that streams weights takes as
long for a few bytes as decode steps take for one visit."""

HEAD_TOKENS = 256
"""Tokens that pass the head at once: logits are wide, and scoring wants many of them."""

EXPERT_WINDOW_BYTES = 256 << 20
"""Memory through which experts stream, if two of them fit in it: enough for a link of 10 GB/s to be
busy for 25 ms while the rest of a layer is computed."""

UNPACKED_BYTES = 128 << 20
"""A packed cache is unpacked so much at a time, as many whole rows of a layer as that is: enough for
a kernel's call to be worth it, and little beside a cache that is worth packing."""

PACK_WORK_BYTES = 32 << 20
"""What lies between values and their packed form, at most: a codec takes 2^20 values at a time."""

PACK_WORK_RATIO = 16
"""The same for each byte of values, where there are fewer: 32 bytes a value in half precision."""

GRAIN_BYTES = 4096
"""Memory and disk are handed out in multiples of this: a page of memory."""

CUT_ROWS = 2
"""What whole rows add to a share at most: half a row at either end of each of two cuts."""

SPARSE_SCORES = 4
"""Where decode steps choose values: what that takes, in scores and their softmax of full attention.
Weights stay until values have come; of whoever shares them they are summed up, and sorted with their
columns in 8 bytes each; and what is sorted comes out with places in 8 bytes more."""

SPILL_SLACK = 0.25
"""Of what is spilled: holes in the spill file that are too small for what is wanted next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCaches:
    """Layers whose caches are alike."""

    num_layers: int
    plane_token_bytes: int
    """Keys of one token in one layer; its values take as much."""
    num_planes: int = 2
    """2, keys and values; 1 where they are the same."""
    window: int | None = None
    """Tokens that are seen, where not all are."""
    packings: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """By codec, what each plane of GROUP_TOKENS tokens takes when it is packed."""
    packed: tuple[int, ...] = ()
    """That of the codec in force; empty if tokens are kept as they were computed."""

    def kept_in(self, codec: str) -> LayerCaches:
        """The same, kept in a codec of `packings`, or in "none"."""
        return replace(self, packed=dict(self.packings)[codec] if codec != "none" else ())

    @property
    def token_bytes(self) -> int:
        """Keys and values of one token in one layer, as they are computed."""
        return self.num_planes * self.plane_token_bytes

    @property
    def group(self) -> int:
        """Columns that are packed together."""
        return GROUP_TOKENS if self.packed else 1

    def page_row_bytes(self, width: int) -> int:
        """One row of a page: keys and values each in whole grains of memory."""
        return self.num_planes * _grains(width * self.plane_token_bytes)

    def packed_row_bytes(self, width: int) -> int:
        """The same of a page that is packed."""
        assert width % GROUP_TOKENS == 0, width
        return sum(_grains(width // GROUP_TOKENS * num_bytes) for num_bytes in self.packed)

    def prompt_row_bytes(self, prompt: int, page_tokens: int) -> int:
        """All pages that one row's prompt is kept in."""
        widths, _ = page_widths(prompt, 0, page_tokens, self.window, self.group)
        kept = self.packed_row_bytes if self.packed else self.page_row_bytes
        return sum(kept(width) for width in widths)

    def row_bytes(self, prompt: int, decoded: int, page_tokens: int) -> int:
        """The most that one row takes of memory in one layer."""
        return _row_bytes(self, prompt, decoded, page_tokens)[0]

    def spilled_row_bytes(self, prompt: int, decoded: int, page_tokens: int) -> int:
        """The most that one row takes of the disk in one layer."""
        return _row_bytes(self, prompt, decoded, page_tokens)[1]

    @property
    def keys(self) -> LayerCaches:
        """The keys alone."""
        return replace(self, num_planes=1, packed=self.packed[:1])

    @property
    def values(self) -> LayerCaches:
        """The values alone."""
        return replace(self, num_planes=1, packed=self.packed[-1:])

    def seen_bytes(self, tokens: float) -> float:
        """What a decode step reads of a row of so many tokens in one layer."""
        token_bytes = sum(self.packed) / GROUP_TOKENS if self.packed else self.token_bytes
        return token_bytes * (tokens if self.window is None else min(tokens, self.window))


@lru_cache(maxsize=64)  # while a policy is looked for, the same row is asked for again and again
def _row_bytes(cache: LayerCaches, prompt: int, decoded: int, page_tokens: int) -> tuple[int, int]:
    """The most that a row takes in memory, and on disk, where nothing comes before it is packed."""
    of_prompt, of_decoded = page_widths(prompt, decoded, page_tokens, cache.window, cache.group)
    edges = edges_of((*of_prompt, *of_decoded))
    packed = cache.packed_row_bytes if cache.packed else None
    sizes, beside = page_sizes(of_prompt, of_decoded, cache.page_row_bytes, packed)
    in_memory = most_kept(sizes, edges, cache.window, beside=beside)
    if beside is None:
        return in_memory, in_memory
    if of_decoded:
        sizes[-1] = 0
    return in_memory, most_kept(sizes, edges, cache.window)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a model's parts take, in bytes."""

    layer_bytes: tuple[int, ...]
    """Weights of each layer of the schedule as they lie on disk."""
    layer_slack_bytes: int
    """What whole rows and aligned buffers add to the parts of a layer, at most."""
    table_bytes: int
    """Of these, tables that are read by rows and never stream."""
    expert_bytes: tuple[int, ...]
    """Of each layer, what is experts'."""
    one_expert_bytes: int
    """The largest expert, in whole grains of memory."""
    experts_picked: float
    """Share of the experts that a token passes."""
    packed_scratch_bytes: int
    """The numbers that packed matrices of a layer become, experts left out, at most."""
    expert_scratch_bytes: int
    """The same of one expert."""
    decoded_ratio: float
    """Bytes of a weight in the dtype computed in for each byte on disk."""
    caches: tuple[LayerCaches, ...]
    """The layers' caches, alike ones together."""
    hidden_token_bytes: int
    """Hidden states of one token between two layers."""
    work_token_bytes: int
    """What computing one token of a visit takes beside the states themselves."""
    head_token_bytes: int
    """Logits of one token and their copies."""
    score_bytes: int
    """Attention scores of one row and column in a decode step."""
    crossing_token_bytes: int
    """Queries, new keys and values, and results of one token in one layer."""
    projection_bytes: int
    """Query, key and value matrices of all layers, as they lie on disk."""
    projection_values: int
    """Numbers in these matrices."""
    max_positions: int
    """The longest row the model takes."""

    @property
    def num_layers(self) -> int:
        """Layers that have a cache."""
        return sum(cache.num_layers for cache in self.caches)

    @property
    def cache_token_bytes(self) -> int:
        """What one token takes in all layers, as it is computed."""
        return sum(cache.num_layers * cache.token_bytes for cache in self.caches)

    def kept_in(self, codec: str) -> ModelSizes:
        """The same with caches that are kept in a codec."""
        if codec == "none":
            return self
        return replace(self, caches=tuple(cache.kept_in(codec) for cache in self.caches))

    def seen_bytes(self, tokens: float, value_share: float = 1.0) -> float:
        """What a decode step reads of the cache of a row of so many tokens, in all layers.

        Of values, this share.
        """
        seen_bytes = sum(cache.num_layers * cache.seen_bytes(tokens) for cache in self.caches)
        if value_share == 1:
            return seen_bytes
        return seen_bytes - (1 - value_share) * sum(
            cache.num_layers * cache.values.seen_bytes(tokens) for cache in self.caches
        )

    @property
    def weight_bytes(self) -> int:
        """All weights, as they lie on disk."""
        return sum(self.layer_bytes)

    @property
    def stream_bytes(self) -> int:
        """What a sweep streams if nothing is resident, and every expert is picked."""
        return self.weight_bytes - self.table_bytes

    @property
    def has_experts(self) -> bool:
        """Whether a sweep's tokens pass each layer together, so that an expert moves once."""
        return self.one_expert_bytes > 0

    def streamed_bytes(self, num_tokens: float) -> float:
        """The same for so many tokens, if they pick all experts equally often."""
        left_out = (1 - self.experts_picked) ** num_tokens if self.has_experts else 0.0
        return self.stream_bytes - left_out * sum(self.expert_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSizes:
    """Lengths of a job's rows, in tokens."""

    prompt_tokens: int
    """The longest prompt."""
    new_tokens: int
    """The most tokens that a row may generate."""
    num_rows: int | None = None
    """How many rows there are; None is unknown, as many as you like."""
    mean_prompt_tokens: float | None = None
    """Of all prompts; None: all are as long as the longest."""
    mean_new_tokens: float | None = None
    """Of what rows generate; None: all as many as they may."""

    @property
    def mean_prompt(self) -> float:
        """Tokens of the mean prompt."""
        return self.mean_prompt_tokens or self.prompt_tokens

    @property
    def mean_new(self) -> float:
        """What the mean row generates."""
        return self.mean_new_tokens or self.new_tokens

    @property
    def columns(self) -> int:
        """Cache columns of the longest row; the last token sampled needs none."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes on each tier; where memory is unified, all of host's are in device's."""

    weights_bytes: tuple[int, int, int]
    """Resident weights on device and host, and what streams from disk."""
    load_bytes: tuple[int, int]
    """Buffers that resident weights pass through, on device and host, before anything else is."""
    cache_bytes: tuple[int, int, int]
    """KV cache at home on device, host and disk."""
    open_page_bytes: int
    """Newest pages of rows at home on disk, which wait in host memory."""
    activation_bytes: tuple[int, int, int]
    staging_bytes: tuple[int, int]
    """Buffers for what is fetched ahead, on device and host."""
    behind_bytes: tuple[int, int]
    """Buffers for what is written back behind, and for decoded copies of streamed weights; for
    hidden states on their way, in either direction."""
    work_bytes: int
    """What computing takes on the device."""
    unified: bool

    @property
    def device_bytes(self) -> int:
        """All of it on the device."""
        return max(self.peaks[0])

    @property
    def host_bytes(self) -> int:
        """All of it on the host; 0 where memory is unified."""
        return max(self.peaks[1])

    @property
    def peaks(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """On device and host, what it takes while weights are loaded, and while the job runs."""
        run_bytes = self._run_bytes
        device, host = (
            (weights + load, weights + run)
            for weights, load, run in zip(
                self.weights_bytes, self.load_bytes, run_bytes, strict=False
            )
        )
        if self.unified:
            device, host = (device[0] + host[0], device[1] + host[1]), (0, 0)
        return (device[0], device[1] + self.work_bytes), host

    @property
    def disk_bytes(self) -> int:
        """What is spilled; weights are read where they lie."""
        return math.ceil((1 + SPILL_SLACK) * (self.cache_bytes[2] + self.activation_bytes[2]))

    @property
    def _run_bytes(self) -> tuple[int, int]:
        """What is beside the weights on device and host, but for computing."""
        device_bytes, host_bytes = (
            self.cache_bytes[tier]
            + self.activation_bytes[tier]
            + self.staging_bytes[tier]
            + self.behind_bytes[tier]
            for tier in (0, 1)
        )
        return device_bytes, host_bytes + self.open_page_bytes

    @property
    def headroom_bytes(self) -> tuple[int, int]:
        """What fetching ahead has to leave free on device and host, hidden states aside."""
        return (sum(self.behind_bytes), 0) if self.unified else self.behind_bytes

    @property
    def claim_bytes(self) -> tuple[int, int]:
        """What the caches of all batches set aside of device and host memory."""
        device_bytes, host_bytes = self.cache_bytes[0], self.cache_bytes[1] + self.open_page_bytes
        return (device_bytes + host_bytes, 0) if self.unified else (device_bytes, host_bytes)

    @property
    def states_bytes(self) -> tuple[int, int]:
        """What hidden states take on device and host."""
        device_bytes, host_bytes, _ = self.activation_bytes
        return (device_bytes + host_bytes, 0) if self.unified else (device_bytes, host_bytes)


def expert_window_bytes(layers: Sequence[Sequence[int]]) -> int:
    """Memory through which experts stream, given the sizes of each layer's streaming experts."""
    largest = max((size for sizes in layers for size in sizes), default=0)
    return min(max(map(sum, layers), default=0), max(2 * largest, EXPERT_WINDOW_BYTES))


def page_tokens_for(policy: Policy, preferred: int) -> int:
    """Columns of a cache page: what the device prefers, or less where newest pages wait.

    Where the cache is packed, its groups say it.
    """
    if policy.compress_cache != "none":
        return GROUP_TOKENS
    return min(preferred, SPILL_PAGE_TOKENS) if policy.cache.disk else preferred


def layer_splits(layer_bytes: Sequence[int], split: Split) -> list[Split]:
    """The weight split of each layer, which together make `split`.

    The head is the largest layer by far in most models, and staging it would take as much
    memory as keeping it; so what may stay on the device is first of all the head. What is left is
    spread evenly over the other layers.
    """
    head_bytes = layer_bytes[-1]
    other_bytes = sum(layer_bytes) - head_bytes
    device_bytes = split.device * (head_bytes + other_bytes)
    head_share = min(1.0, device_bytes / head_bytes)
    other_share = max(0.0, device_bytes - head_bytes) / other_bytes
    others = _with_device(split, min(1.0, other_share))
    return [*(others for _ in layer_bytes[:-1]), _with_device(split, head_share)]


def _with_device(split: Split, device: float) -> Split:
    """Another device share; host and disk keep their proportion."""
    away = split.host + split.disk
    if away <= 0:
        return split
    host = (1 - device) * split.host / away
    return Split(device=device, host=host, disk=max(0.0, 1 - device - host))


def footprint(
    model: ModelSizes,
    job: JobSizes,
    policy: Policy,
    preferred_page_tokens: int,
    unified: bool,
    addressable: bool = True,
) -> Footprint:
    """What the policy takes at most while it runs the job.

    Where memory is unified and the host does not address the device's, what streams from disk
    passes through host memory on its way, out of the same pool.

    Shares are cut by whole rows, a row more or less on either side of a cut, and every buffer is
    a whole number of memory pages; in a large model neither is seen, in a tiny one both are.
    """
    model = model.kept_in(policy.compress_cache)
    is_packed = policy.compress_cache != "none"
    page_tokens = page_tokens_for(policy, preferred_page_tokens)
    rows = policy.block_size
    if job.num_rows is not None:
        rows = max(1, min(rows, job.num_rows))
    batch_rows = min(policy.batch_size, rows)
    visit_rows = batch_rows
    is_chunked = policy.sweep_tokens > 0 or job.prompt_tokens > policy.visit_tokens
    if policy.sweep_tokens or model.has_experts:
        visit_rows = max(batch_rows, min(rows, policy.prefill_tokens))
    num_batches = -(-rows // batch_rows)
    prompt_tokens = batch_rows * job.prompt_tokens
    joined_tokens = rows * job.prompt_tokens if model.has_experts else prompt_tokens
    visit_tokens = max(visit_rows, min(policy.visit_tokens, joined_tokens))
    if policy.sweep_tokens:
        # All of a sweep in one visit: its share of prompts, and the steps.
        sweep_prompts = min(rows * job.prompt_tokens, policy.sweep_tokens)
        visit_tokens = max(visit_tokens, min(policy.prefill_tokens, sweep_prompts + rows))
    # Every visit but a band's last is more than half full.
    num_pieces = num_batches * min(
        batch_rows * -(-job.prompt_tokens // policy.visit_tokens),
        1 + -(-2 * prompt_tokens // policy.visit_tokens),
    )
    sweep_tokens = rows * job.prompt_tokens
    if policy.sweep_tokens:
        sweep_tokens = min(sweep_tokens, policy.sweep_tokens + rows)
    ratio = model.decoded_ratio
    host_ratio = ratio if unified else 1.0
    weights = _split(model.weight_bytes, policy.weights)
    slack_bytes = len(model.layer_bytes) * model.layer_slack_bytes
    most_far, far_bytes, disk_bytes = _streamed(
        model, policy.weights, policy.cpu_projections, unified
    )
    load_bytes = _load_bytes(model, policy.weights, unified)

    decoded = job.columns - job.prompt_tokens
    # Of each kind of layer, whose rows are dealt by themselves.
    row = (job.prompt_tokens, decoded, page_tokens)
    kinds = [(cache.num_layers, cache.row_bytes(*row)) for cache in model.caches]
    spilled = [(cache.num_layers, cache.spilled_row_bytes(*row)) for cache in model.caches]
    layer_row_bytes = max(of_layer for _, of_layer in kinds)
    if policy.attn_sparsity < 1 and (is_packed or not is_chunked):
        layer_row_bytes = _keys_row_bytes(model, job, page_tokens)
    page_row_bytes = _page_row_bytes(model, min(page_tokens, decoded))
    cut_page_bytes = num_batches * len(kinds) * page_row_bytes
    cache_far = policy.cache.disk + (0.0 if unified else policy.cache.host)
    # Pages of this visit and of the next one.
    cuts = -(-visit_rows // batch_rows)
    pages_bytes = 2 * _rows_of(visit_rows, cache_far, cuts) * layer_row_bytes
    if policy.cpu_attention and (is_packed or not is_chunked):
        pages_bytes = 0.0  # decode steps leave them on the host, and no other piece needs them
    disk_pages_bytes = 2 * _rows_of(visit_rows, policy.cache.disk, cuts) * layer_row_bytes
    # Pages of two visits may be under way to their home while a third one is computed.
    drafts_bytes = 3 * _written_bytes(model, job, policy, visit_rows, page_tokens, cache_far)
    states_far = policy.activations.disk + (0.0 if unified else policy.activations.host)
    # The states of this visit and of those that come, and of two on their way home.
    states_bytes = (3 + STATES_AHEAD) * _states_bytes(model, visit_tokens, states_far)
    decoded_bytes = model.packed_scratch_bytes + (most_far * ratio if ratio != 1 else 0.0)
    on_disk = 0.0 if unified and addressable else 1.0
    beside_bytes = _beside_bytes(model, job, policy, visit_rows, num_batches)
    unpacked_bytes = work_bytes = 0
    chosen_bytes = _chosen_bytes(
        model, job, policy, visit_rows, num_batches, page_tokens, unified, addressable
    )
    if is_packed:
        unpacked_bytes = _unpacked_bytes(model, job, batch_rows, page_tokens)
        work_bytes = _pack_work_bytes(model, batch_rows)
        if policy.cpu_attention and policy.cache.device < 1:
            beside_bytes += unpacked_bytes + work_bytes
        if is_chunked:
            # The keys and values of one row in one layer, until its prompt is complete.
            unpacked_bytes += _page_row_bytes(model, job.prompt_tokens)
    elif is_chunked:
        work_bytes = _moved_bytes(model, job, page_tokens)
    return Footprint(
        weights_bytes=(
            round(weights[0] * ratio) + slack_bytes * (weights[0] > 0),
            round(weights[1] * host_ratio) + slack_bytes * (weights[1] > 0),
            weights[2],
        ),
        load_bytes=(load_bytes, round(on_disk * load_bytes)),
        cache_bytes=(
            *_cache_split(*_cache_rows(kinds, rows, num_batches), policy.cache)[:2],
            _cache_split(*_cache_rows(spilled, rows, num_batches), policy.cache)[2],
        ),
        open_page_bytes=_cache_split(
            rows * page_row_bytes * model.num_layers, cut_page_bytes, policy.cache
        )[2],
        activation_bytes=_states_split(model, sweep_tokens, num_pieces, policy.activations),
        staging_bytes=(
            round(far_bytes + pages_bytes) + _window_bytes(model, policy.weights, unified),
            round(on_disk * (disk_bytes + disk_pages_bytes))
            + (_window_bytes(model, policy.weights, unified, from_disk=True) if on_disk else 0),
        ),
        behind_bytes=(
            round(drafts_bytes + states_bytes + decoded_bytes + unpacked_bytes + chosen_bytes[0]),
            round(
                on_disk
                * (
                    drafts_bytes * (policy.cache.disk > 0)
                    + states_bytes * (policy.activations.disk > 0)
                    + beside_bytes
                    + chosen_bytes[1]
                )
            ),
        ),
        work_bytes=visit_tokens * model.work_token_bytes
        + min(visit_rows, HEAD_TOKENS) * model.head_token_bytes
        + _step_bytes(model, job, policy, visit_rows)
        + work_bytes,
        unified=unified,
    )


def _away(model: ModelSizes, split: Split, unified: bool) -> list[float]:
    """Of each layer, the bytes that are at home where the device can't compute on them."""
    return [
        size * (each.disk + (0.0 if unified else each.host))
        for size, each in zip(
            model.layer_bytes, layer_splits(model.layer_bytes, split), strict=True
        )
    ]


@lru_cache(maxsize=64)  # a search asks of the same weights with one cache after the other
def _load_bytes(model: ModelSizes, split: Split, unified: bool) -> int:
    """The most that is read at once of what stays: a layer without its experts, or one of these."""
    most = 0.0
    for size, experts, away in zip(
        model.layer_bytes,
        model.expert_bytes,
        _away(model, split, unified),
        strict=True,
    ):
        near = size - away
        most = max(most, min(near, size - experts), min(near, model.one_expert_bytes))
    return round(most) + model.layer_slack_bytes if most > 0 else 0


@lru_cache(maxsize=64)  # see `_load_bytes`
def _streamed(
    model: ModelSizes, split: Split, cpu_projections: bool, unified: bool
) -> tuple[float, float, float]:
    """The most that streams to the device of a layer, of a layer and the next, and of two from disk.

    Experts are left out, which have a window of their own. They are the last to stay.
    """
    splits = layer_splits(model.layer_bytes, split)
    sizes = list(model.layer_bytes)
    sizes[0] -= model.table_bytes
    away_bytes = [
        min(size, away) for size, away in zip(sizes, _away(model, split, unified), strict=True)
    ]

    def streams(size: int, experts: int, away: float, share: float) -> float:
        if share <= 0:
            return 0.0
        dense = min(size - experts, away) if cpu_projections else max(0.0, away - experts)
        return min(dense, size * share) + model.layer_slack_bytes

    far, disk = [], []
    for size, experts, away, each in zip(
        sizes, model.expert_bytes, away_bytes, splits, strict=True
    ):
        far.append(streams(size, experts, away, each.disk + (0.0 if unified else each.host)))
        disk.append(streams(size, experts, away, each.disk))
    return max(far), _neighbours(far), _neighbours(disk)


def _window_bytes(
    model: ModelSizes, split: Split, unified: bool, *, from_disk: bool = False
) -> int:
    """What experts stream through on the device; or on the host, those that come from disk."""
    if not model.has_experts:
        return 0
    splits = layer_splits(model.layer_bytes, split)
    away = [
        size * each.disk if from_disk else own
        for size, each, own in zip(
            model.layer_bytes, splits, _away(model, split, unified), strict=True
        )
    ]
    streaming = max(
        min(own, experts) for own, experts in zip(away, model.expert_bytes, strict=True)
    )
    decoded = 0 if from_disk else model.expert_scratch_bytes
    if streaming <= 0:
        return decoded
    one = model.one_expert_bytes
    largest_share = streaming / max(model.expert_bytes)
    num_experts = max(1, round(max(model.expert_bytes) / one))
    all_bytes = math.ceil((largest_share * num_experts + CUT_ROWS) * one)
    if model.decoded_ratio != 1 and not from_disk:
        decoded += math.ceil(one * model.decoded_ratio)
    return min(all_bytes, max(2 * one, EXPERT_WINDOW_BYTES)) + decoded


def _neighbours(layer_bytes: Sequence[float]) -> float:
    """The most that a layer and the one after it take: one is computed, one is on its way."""
    pairs = zip(layer_bytes, [*layer_bytes[1:], layer_bytes[0]], strict=True)
    return max(here + after for here, after in pairs)


def _page_row_bytes(model: ModelSizes, width: int) -> int:
    """The most that one row takes of a layer's page."""
    return max(cache.page_row_bytes(width) for cache in model.caches)


def _rows_of(rows: int, share: float, cuts: int = 1) -> float:
    """The most of so many rows, in batches that are cut apart, that a share is in any layer."""
    return min(rows, share * rows + CUT_ROWS * cuts) if share > 0 else 0.0


def _written_bytes(
    model: ModelSizes,
    job: JobSizes,
    policy: Policy,
    visit_rows: int,
    page_tokens: int,
    share: float,
) -> float:
    """Parts of pages that a visit writes to, of those at home in this share."""
    if share <= 0:
        return 0.0
    decoded = job.columns - job.prompt_tokens
    newest = _page_row_bytes(model, min(page_tokens, decoded))
    longest = min(policy.visit_tokens, job.prompt_tokens)
    prompt_tokens = policy.visit_tokens
    if policy.sweep_tokens:
        # A row that was begun before goes on, and another one begins that does not end.
        prompt_tokens = longest + min(policy.prefill_tokens, policy.sweep_tokens)
    # A chunk may begin and end within a page, and pages reach back to the longest row's start.
    chunk_tokens = longest + 2 * min(PROMPT_PAGE_TOKENS, job.prompt_tokens)
    prompt_rows = max(1, min(-(-prompt_tokens // longest), visit_rows))
    most = most_of_row = 0
    for cache in model.caches:
        if cache.packed:
            # Pages of prompts go home one by one, as soon as they are packed.
            widths, _ = page_widths(job.prompt_tokens, 0, page_tokens, cache.window, cache.group)
            of_row = cache.packed_row_bytes(max(widths, default=0))
            most, most_of_row = max(most, visit_rows * of_row), max(most_of_row, of_row)
            if decoded > GROUP_TOKENS:
                newest = max(newest, cache.packed_row_bytes(GROUP_TOKENS))
            continue
        of_row = cache.page_row_bytes(chunk_tokens)
        of_visit = prompt_rows * of_row
        if cache.window is not None:
            # The row that goes on has all that is kept of it moved; no row has more written.
            kept = cache.prompt_row_bytes(job.prompt_tokens, page_tokens)
            of_row, of_visit = kept, min(visit_rows * kept, of_visit + kept)
        most, most_of_row = max(most, of_visit), max(most_of_row, of_row)
    all_bytes = most + visit_rows * newest
    return min(all_bytes, share * all_bytes + CUT_ROWS * (most_of_row + newest))


def _unpacked_bytes(model: ModelSizes, job: JobSizes, batch_rows: int, page_tokens: int) -> int:
    """Room in which rows of a packed cache are unpacked, one layer of some of them at a time."""
    row_bytes = max(
        cache.kept_in("none").row_bytes(
            -(-job.prompt_tokens // GROUP_TOKENS) * GROUP_TOKENS,
            job.columns - job.prompt_tokens,
            page_tokens,
        )
        for cache in model.caches
    )
    return min(batch_rows * row_bytes, max(UNPACKED_BYTES, row_bytes))


def _chosen_bytes(
    model: ModelSizes,
    job: JobSizes,
    policy: Policy,
    visit_rows: int,
    num_batches: int,
    page_tokens: int,
    unified: bool,
    addressable: bool,
) -> tuple[float, float]:
    """What values take on device and host that decode steps have chosen, and their way there."""
    if policy.attn_sparsity == 1:
        return 0.0, 0.0
    cuts = -(-visit_rows // min(policy.batch_size, visit_rows))
    row = (job.prompt_tokens, job.columns - job.prompt_tokens, page_tokens)
    lines_bytes = max(
        _kept(policy, job, cache) * cache.values.seen_bytes(1) for cache in model.caches
    )
    read_bytes = max(cache.values.row_bytes(*row) for cache in model.caches)
    columns_bytes = max(_kept(policy, job, cache) for cache in model.caches) * model.score_bytes
    disk_rows = _rows_of(visit_rows, policy.cache.disk, cuts)
    far_rows = _rows_of(visit_rows, policy.cache.disk + (not unified) * policy.cache.host, cuts)
    # Buffers of each band of each batch: lines here and there, and columns.
    edges_bytes = 3 * 3 * num_batches * GRAIN_BYTES if far_rows else 0
    if policy.cpu_attention or (unified and addressable):
        in_place_bytes = disk_rows * (lines_bytes + read_bytes) + edges_bytes
        return (0.0, in_place_bytes) if policy.cpu_attention else (in_place_bytes, 0.0)
    return (
        far_rows * lines_bytes + edges_bytes,
        far_rows * (lines_bytes + columns_bytes) + disk_rows * read_bytes + edges_bytes,
    )


def _keys_row_bytes(model: ModelSizes, job: JobSizes, page_tokens: int) -> int:
    """What a decode step fetches of a row in one layer where values stay: but for the newest page's."""
    decoded = job.columns - job.prompt_tokens
    return max(
        cache.keys.row_bytes(job.prompt_tokens, decoded, page_tokens)
        + cache.page_row_bytes(min(page_tokens, decoded))
        for cache in model.caches
    )


def _step_bytes(model: ModelSizes, job: JobSizes, policy: Policy, visit_rows: int) -> int:
    """What attention of a visit's decode steps takes to work in."""
    score_bytes = visit_rows * job.columns * model.score_bytes
    if policy.attn_sparsity == 1:
        return score_bytes
    batch_rows = min(policy.batch_size, visit_rows)
    # A page whose rows don't lie end to end is copied to be multiplied with.
    most = max(
        (
            cache.plane_token_bytes * min(PROMPT_PAGE_TOKENS, job.columns)
            for cache in model.caches
            if cache.plane_token_bytes % GRAIN_BYTES
        ),
        default=0,
    )
    num_bytes = SPARSE_SCORES * score_bytes + batch_rows * most
    if policy.compress_cache != "none":
        exact_bytes = batch_rows * max(
            _kept(policy, job, cache) * cache.plane_token_bytes for cache in model.caches
        )
        num_bytes += exact_bytes + min(PACK_WORK_BYTES, PACK_WORK_RATIO * exact_bytes)
    return num_bytes


def _kept(policy: Policy, job: JobSizes, cache: LayerCaches) -> int:
    """The most columns of a row whose values a decode step adds up."""
    seen = job.columns if cache.window is None else min(job.columns, cache.window)
    return math.ceil(policy.attn_sparsity * seen)


def _pack_work_bytes(model: ModelSizes, batch_rows: int) -> int:
    """What packing and unpacking take beside what is packed, and a row's page in front of that."""
    page_bytes = _page_row_bytes(model, PROMPT_PAGE_TOKENS)
    return min(PACK_WORK_BYTES, PACK_WORK_RATIO * batch_rows * page_bytes) + page_bytes


def _moved_bytes(model: ModelSizes, job: JobSizes, page_tokens: int) -> int:
    """A page's copy, by which what a window keeps of a row moves up when its prompt goes on."""
    return max(
        (
            cache.page_row_bytes(
                page_widths(job.prompt_tokens, 0, page_tokens, cache.window)[0][-1]
            )
            for cache in model.caches
            if cache.window is not None and 1 < cache.window <= job.prompt_tokens
        ),
        default=0,
    )


def _beside_bytes(
    model: ModelSizes, job: JobSizes, policy: Policy, visit_rows: int, num_batches: int
) -> float:
    """Host memory that a CPU beside the device takes for what crosses, and for computing."""
    # What was brought to the device before may still be on its way.
    crossing_bytes = 2 * visit_rows * model.crossing_token_bytes
    num_bytes = 0.0
    if policy.cpu_attention and policy.cache.device < 1:
        num_bytes += crossing_bytes + _step_bytes(model, job, policy, visit_rows)
        num_bytes += 4 * num_batches * GRAIN_BYTES
    if policy.cpu_projections and policy.weights.host > 0:
        num_bytes += crossing_bytes + 2 * visit_rows * model.hidden_token_bytes + 8 * GRAIN_BYTES
    return num_bytes


def _states_bytes(model: ModelSizes, tokens: int, share: float) -> float:
    """The part of a visit's states that is at home far away."""
    if share <= 0:
        return 0.0
    return min(tokens, share * tokens + CUT_ROWS) * model.hidden_token_bytes + 2 * GRAIN_BYTES


def _states_split(
    model: ModelSizes, tokens: int, num_pieces: int, split: Split
) -> tuple[int, int, int]:
    device, host, disk = (
        round(_rows_of(tokens, share) * model.hidden_token_bytes + num_pieces * GRAIN_BYTES)
        if share > 0
        else 0
        for share in split.shares()
    )
    return device, host, disk


def _cache_rows(kinds: Sequence[tuple[int, int]], rows: int, num_batches: int) -> tuple[int, int]:
    """All rows' cache, and a row of each batch and kind, given layers of each kind and their row."""
    return (
        rows * sum(num_layers * of_layer for num_layers, of_layer in kinds),
        num_batches * sum(of_layer for _, of_layer in kinds),
    )


def _cache_split(all_bytes: float, cut_bytes: float, split: Split) -> tuple[int, int, int]:
    """The cache on each tier, where cuts may go through cut_bytes: a row of each batch and kind."""
    device, host, disk = (
        round(min(all_bytes, share * all_bytes + CUT_ROWS * cut_bytes)) if share > 0 else 0
        for share in split.shares()
    )
    return device, host, disk


def _grains(num_bytes: float) -> int:
    return -(-math.ceil(num_bytes) // GRAIN_BYTES) * GRAIN_BYTES


def _split(num_bytes: float, split: Split) -> tuple[int, int, int]:
    device, host, disk = (round(num_bytes * share) for share in split.shares())
    return device, host, disk

"""How many bytes a policy takes on each tier, at most.

The same sums decide which policy is chosen, whether a policy is refused before the first byte
moves, and how much of each tier the engine sets aside.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexport.policy import Policy, Split

__all__ = ["HEAD_TOKENS", "Footprint", "JobSizes", "ModelSizes", "cache_row_bytes", "footprint"]

HEAD_TOKENS = 256
"""Tokens that pass the head at once: logits are wide, and scoring wants many of them."""

STREAMED_LAYERS = 2
"""Layers in staging at once: the one that is computed, and the next one on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSizes:
    """What a model's parts take, in bytes."""

    layer_bytes: tuple[int, ...]
    """Weights of each layer of the schedule as they lie on disk."""
    table_bytes: int
    """Of these, tables that are read by rows and never stream."""
    decoded_ratio: float
    """Bytes of a weight in the dtype computed in for each byte on disk."""
    cache_token_bytes: int
    """Keys and values of one token in all layers."""
    num_layers: int
    """Layers that have a cache."""
    hidden_token_bytes: int
    """Hidden states of one token between two layers."""
    work_token_bytes: int
    """What computing one token of a visit takes beside the states themselves."""
    head_token_bytes: int
    """Logits of one token and their copies."""
    score_bytes: int
    """Attention scores of one row and column in a decode step."""
    token_flops: int
    """Multiplications and additions of one token."""
    max_positions: int
    """The longest row the model takes."""

    @property
    def weight_bytes(self) -> int:
        """All weights, as they lie on disk."""
        return sum(self.layer_bytes)

    @property
    def stream_bytes(self) -> int:
        """What a sweep streams if nothing is resident."""
        return self.weight_bytes - self.table_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSizes:
    """Lengths of a job's rows, in tokens."""

    prompt_tokens: int
    """The longest prompt."""
    new_tokens: int
    """The most tokens that a row may generate."""
    num_rows: int | None = None
    """How many rows there are; None is unknown, as many as you like."""

    @property
    def columns(self) -> int:
        """Cache columns of the longest row; the last token sampled needs none."""
        return self.prompt_tokens + self.new_tokens - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Bytes on each tier; where memory is unified, all of host's are in device's."""

    weights_bytes: tuple[int, int, int]
    """Resident weights on device and host, and what streams from disk."""
    cache_bytes: tuple[int, int, int]
    """KV cache at home on device, host and disk."""
    open_page_bytes: int
    """Newest pages of rows at home on disk, which wait in host memory."""
    activation_bytes: tuple[int, int, int]
    staging_bytes: tuple[int, int]
    """Buffers for what is fetched ahead, on device and host."""
    behind_bytes: tuple[int, int]
    """Buffers for what is written back behind, and for decoded copies of streamed weights."""
    work_bytes: int
    """What computing takes on the device."""
    unified: bool

    @property
    def device_bytes(self) -> int:
        """All of it on the device."""
        own_bytes = (
            self.weights_bytes[0]
            + self.cache_bytes[0]
            + self.activation_bytes[0]
            + self.staging_bytes[0]
            + self.behind_bytes[0]
            + self.work_bytes
        )
        return own_bytes + self._host_bytes if self.unified else own_bytes

    @property
    def host_bytes(self) -> int:
        """All of it on the host; 0 where memory is unified."""
        return 0 if self.unified else self._host_bytes

    @property
    def disk_bytes(self) -> int:
        """What is spilled; weights are read where they lie."""
        return self.cache_bytes[2] + self.activation_bytes[2]

    @property
    def _host_bytes(self) -> int:
        return (
            self.weights_bytes[1]
            + self.cache_bytes[1]
            + self.open_page_bytes
            + self.activation_bytes[1]
            + self.staging_bytes[1]
            + self.behind_bytes[1]
        )

    @property
    def headroom_bytes(self) -> tuple[int, int]:
        """What fetching ahead has to leave free on device and host."""
        host_bytes = self.behind_bytes[1] + self.activation_bytes[1]
        device_bytes = self.behind_bytes[0] + self.activation_bytes[0]
        return (device_bytes + host_bytes, 0) if self.unified else (device_bytes, host_bytes)


def cache_row_bytes(model: ModelSizes, columns: int, page_tokens: int) -> int:
    """The cache of one row of so many columns, in whole pages."""
    return -(-columns // page_tokens) * page_tokens * model.cache_token_bytes


def footprint(
    model: ModelSizes, job: JobSizes, policy: Policy, page_tokens: int, unified: bool
) -> Footprint:
    """What the policy takes at most while it runs the job."""
    rows = policy.block_size
    if job.num_rows is not None:
        rows = max(1, min(rows, job.num_rows))
    batch_rows = min(policy.batch_size, rows)
    row_bytes = cache_row_bytes(model, job.columns, page_tokens)
    cache_bytes = _split(rows * row_bytes, policy.cache)
    visit_tokens = min(policy.prefill_tokens, batch_rows * job.prompt_tokens)
    sweep_tokens = rows * job.prompt_tokens
    if policy.sweep_tokens:
        sweep_tokens = min(sweep_tokens, max(policy.sweep_tokens, visit_tokens) + rows)
    ratio = model.decoded_ratio
    weights = _split(model.weight_bytes, policy.weights)
    host_ratio = ratio if unified else 1.0
    far = policy.weights.disk + (0.0 if unified else policy.weights.host)
    layer_bytes = max(model.layer_bytes) * far
    cache_far = policy.cache.disk + (0.0 if unified else policy.cache.host)
    # Pages of this visit and of the next one.
    pages_bytes = 2 * batch_rows * row_bytes / model.num_layers * cache_far
    # Pages of two visits may be under way to their home while a third one is computed.
    new_tokens = visit_tokens + batch_rows * page_tokens
    drafts_bytes = 3 * new_tokens * model.cache_token_bytes / model.num_layers * cache_far
    states_far = policy.activations.disk + (0.0 if unified else policy.activations.host)
    states_bytes = 4 * visit_tokens * model.hidden_token_bytes * states_far
    decoded_bytes = layer_bytes * ratio if ratio != 1 else 0.0
    on_disk = 0.0 if unified else 1.0
    return Footprint(
        weights_bytes=(round(weights[0] * ratio), round(weights[1] * host_ratio), weights[2]),
        cache_bytes=cache_bytes,
        open_page_bytes=round(rows * policy.cache.disk * page_tokens * model.cache_token_bytes),
        activation_bytes=_split(sweep_tokens * model.hidden_token_bytes, policy.activations),
        staging_bytes=(
            round(layer_bytes * STREAMED_LAYERS + pages_bytes + states_bytes),
            round(
                on_disk
                * (
                    max(model.layer_bytes) * policy.weights.disk * STREAMED_LAYERS
                    + pages_bytes * (policy.cache.disk > 0)
                    + states_bytes * (policy.activations.disk > 0)
                )
            ),
        ),
        behind_bytes=(
            round(drafts_bytes + decoded_bytes),
            round(on_disk * drafts_bytes * (policy.cache.disk > 0)),
        ),
        work_bytes=visit_tokens * model.work_token_bytes
        + min(batch_rows, HEAD_TOKENS) * model.head_token_bytes
        + batch_rows * job.columns * model.score_bytes,
        unified=unified,
    )


def _split(num_bytes: float, split: Split) -> tuple[int, int, int]:
    device, host, disk = (round(num_bytes * share) for share in split.shares())
    return device, host, disk

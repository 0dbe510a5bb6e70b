"""Where everything lives and how rows are grouped: the record that a run obeys.

A policy has three splits (weights, KV cache, activations over device, host and disk: nine
shares) and a block shape. It knows no model and no machine; the planner makes one, the store
and the schedule obey it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

from flexport.errors import PolicyError

__all__ = ["CACHE_CODECS", "WEIGHT_CODECS", "Budgets", "Policy", "Split", "Tier"]

WEIGHT_CODECS = ("none", "int8", "int4", "int4:32", "int4:64", "int4:128", "int4:256")
"""How weights may be compressed. int8 has a scale a row; int4 a scale and a zero for each group of
64 features, or of as many as are named."""

CACHE_CODECS = ("none", "int8", "int4")
"""What a KV cache may be kept in: the dtype computed in, or 8 or 4 bits a value."""


class Tier(Enum):
    """A place where tensors live, fastest first."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """Shares of one kind of tensor on each tier; they add up to 1."""

    device: float = 1.0
    host: float = 0.0
    disk: float = 0.0

    def __post_init__(self) -> None:
        shares = (self.device, self.host, self.disk)
        # Written so that a NaN, which compares as false, is refused too.
        if not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):
            raise PolicyError(f"shares must be >= 0 and add up to 1, got {shares}")

    def share(self, tier: Tier) -> float:
        """The share that lives on `tier`."""
        return float(getattr(self, tier.value))

    def shares(self) -> tuple[float, float, float]:
        """Device, host and disk share, in that order."""
        return (self.device, self.host, self.disk)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Hard caps in bytes. On a device with unified memory, device + host are one pool."""

    device_bytes: int
    host_bytes: int
    disk_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The nine shares and the block shape.

    batch_size rows make a micro-batch, num_batches micro-batches are in flight at once and share
    every sweep over the weights. prefill_tokens bounds the tokens of one visit (a longer
    micro-batch is prefilled in chunks), and sweep_tokens is how many prompt tokens one sweep over
    the layers carries while there are any (0 = no bound): a small value mixes the prefill of new rows with
    the decode of old ones, so that prompts are computed while weights are on their way.

    With cpu_attention, decode steps of rows whose cache is at home on host or disk are attended on
    the CPU: their queries and results cross the link, not their cache. With cpu_projections, a
    sweep of decode steps multiplies with those rows of the query, key and value matrices that are
    at home on the host on the CPU too, so that they stay where they are. Where host and device are
    one memory there is nothing to spare, and neither may be asked for.

    compress_weights is how the decoder layers' matrices are packed, where they rest and travel.

    compress_cache is what the KV cache is kept in, but for the newest tokens: "none" (the dtype
    computed in), "int8" or "int4". Prompts attend to what they are before it is packed, one layer
    at a time, so they pass all layers in one sweep: sweep_tokens must be 0 then.

    attn_sparsity is the share of the tokens that a row sees whose values a decode step adds up, for
    each key/value head those of the largest attention weights; the others' stay where they are. 1 is
    all of them.
    """

    weights: Split = Split()
    cache: Split = Split()
    activations: Split = Split()
    batch_size: int = 16
    num_batches: int = 1
    prefill_tokens: int = 2048
    sweep_tokens: int = 0
    cpu_attention: bool = False
    cpu_projections: bool = False
    compress_weights: str = "none"
    compress_cache: str = "none"
    attn_sparsity: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cpu_attention", "cpu_projections"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be true or false, got {getattr(self, name)!r}")
        if self.compress_weights not in WEIGHT_CODECS:
            raise PolicyError(
                f"weights can't be compressed as {self.compress_weights!r}; it is one of "
                f"{', '.join(WEIGHT_CODECS)}"
            )
        for name in ("batch_size", "num_batches", "prefill_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise PolicyError(f"{name} must be a whole number >= 1, got {value!r}")
        if not isinstance(self.sweep_tokens, int) or self.sweep_tokens < 0:
            raise PolicyError(
                f"sweep_tokens must be >= 0 (0 = no bound), got {self.sweep_tokens!r}"
            )
        share: object = self.attn_sparsity
        # Written so that a NaN is refused too.
        if isinstance(share, bool) or not (isinstance(share, int | float) and 0 < share <= 1):
            raise PolicyError(
                f"attn_sparsity is the share of the values that decode steps add up, above 0 and at "
                f"most 1 (1 = all), got {share!r}"
            )
        if self.compress_cache not in CACHE_CODECS:
            raise PolicyError(
                f"compress_cache is one of {', '.join(CACHE_CODECS)}, got {self.compress_cache!r}"
            )
        if self.compress_cache != "none" and self.sweep_tokens:
            raise PolicyError(
                f"compress_cache {self.compress_cache} and sweep_tokens {self.sweep_tokens} don't go "
                "together: a prompt that several sweeps share would have to stay uncompressed in all "
                "layers until its end; leave sweep_tokens out, or 0, or compress_cache"
            )

    @property
    def block_size(self) -> int:
        """Rows that share one sweep over the weights."""
        return self.batch_size * self.num_batches

    @property
    def visit_tokens(self) -> int:
        """The most prompt tokens of one visit."""
        return min(self.prefill_tokens, self.sweep_tokens or self.prefill_tokens)

    @staticmethod
    def splits_from_percent(percent: Sequence[float]) -> tuple[Split, Split, Split]:
        """Weights, cache and activation splits of FlexGen's six numbers.

        The numbers are per cent of weights on device and host, of KV on device and host, of
        activations on device and host; what is left of each pair is on disk.
        """
        if len(percent) != 6:
            raise PolicyError(f"percent takes six numbers (WD WH KD KH AD AH), got {len(percent)}")
        splits = []
        for kind, device, host in zip(
            ("weights", "KV", "activations"), percent[::2], percent[1::2], strict=True
        ):
            if min(device, host) < 0 or device + host > 100:
                raise PolicyError(
                    f"percent for {kind}: device {device} and host {host} must be >= 0 and add up "
                    "to at most 100; the rest is on disk"
                )
            disk = max(0.0, 100 - device - host)
            splits.append(Split(device=device / 100, host=host / 100, disk=disk / 100))
        return splits[0], splits[1], splits[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `Policy.from_dict` takes it."""
        return asdict(self)

    def to_json(self) -> str:
        """The policy as a JSON object."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_file(cls, path: str | Path) -> Policy:
        """The policy of a JSON file, or of a plan or report in one, which has it under "policy".

        Raises PolicyError, naming the file, if it holds none.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise PolicyError(f"can't read the policy file {path}: {error.strerror}") from error
        except ValueError as error:  # not JSON, or not text at all
            raise PolicyError(f"the policy file {path} is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise PolicyError(
                f"the policy file {path} holds a {type(data).__name__}, not an object"
            )
        own = data.get("policy", data)
        if not isinstance(own, dict):
            raise PolicyError(
                f'the policy file {path} has {own!r} as its "policy", which must be an object'
            )
        try:
            return cls.from_dict(own)
        except PolicyError as error:
            raise PolicyError(f"the policy file {path}: {error}") from error

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Policy:
        """The policy of a JSON object; raises PolicyError for unknown or ill-typed fields."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise PolicyError(f"unknown policy fields {unknown}; known: {sorted(known)}")
        values = dict(data)
        for name in ("weights", "cache", "activations"):
            if name in values and not isinstance(values[name], Split):
                try:
                    values[name] = Split(**values[name])
                except TypeError as error:
                    raise PolicyError(f"policy field {name!r}: {error}") from error
        return cls(**values)

"""Other programs on the same work, each a small script that runs in a process of its own.

    python -m flexport.bench.peers.NAME --model DIR --batch-size N --num-prompts N
        --prompt-len N --gen-len N --seed N --scratch DIR [--device-memory BYTES]

prints one JSON line. A script knows its peer's library and nothing of flexport's engine.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PEERS", "Peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """What runs a peer, and what it needs."""

    name: str
    module: str
    packages: tuple[str, ...]
    """Top-level packages that it imports; without one of them the peer is reported as missing."""
    batch_sizes: tuple[int, ...]
    """Each is tried; the best counts."""
    case: str
    """Which case of `flexport.bench.versus` it is a peer in."""


PEERS = (
    Peer(
        name="transformers, in memory",
        module="flexport.bench.peers.in_memory",
        packages=("transformers",),
        batch_sizes=(8, 16, 32, 64),
        case="memory",
    ),
    Peer(
        name="transformers, memory-mapped",
        module="flexport.bench.peers.memory_mapped",
        packages=("transformers", "safetensors"),
        batch_sizes=(4, 8, 16),
        case="capped",
    ),
    Peer(
        name="accelerate, offloaded to disk",
        module="flexport.bench.peers.disk_offload",
        packages=("transformers", "accelerate"),
        batch_sizes=(4,),
        case="capped",
    ),
    Peer(
        name="accelerate, placed by itself",
        module="flexport.bench.peers.auto_placed",
        packages=("transformers", "accelerate"),
        batch_sizes=(4, 16, 32),
        case="card",
    ),
)

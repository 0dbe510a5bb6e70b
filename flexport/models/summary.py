"""The numbers that people ask of a model before they run it, as plain data.

Bytes are those of 16-bit weights and cache, which most checkpoints are published and run in.
"""

from __future__ import annotations

from typing import Any

from flexport.models.spec import (
    Attention,
    ClampedSilu,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
)
from flexport.models.tensors import (
    distinct_layers,
    kv_bytes_per_token,
    layer_tensors,
    num_parameters,
)

__all__ = ["num_active_parameters", "summary"]

_ITEM_BYTES = 2


def summary(spec: ModelSpec) -> dict[str, Any]:
    """Sizes of the whole, and "kinds": what layers there are, and how many of each."""
    kinds: list[dict[str, Any]] = []
    for index, count in distinct_layers(spec).items():
        kind = {
            **_layer(spec.layers[index - 1]),
            "kv_bytes_per_token": kv_bytes_per_token(spec, index - 1, _ITEM_BYTES),
        }
        like = next((k for k in kinds if {**k, "layers": 0} == {**kind, "layers": 0}), None)
        if like is None:
            kinds.append({"layers": count, **kind})
        else:  # they differ in how they turn, which is not told here
            like["layers"] += count
    return {
        "family": spec.family,
        "parameters": num_parameters(spec),
        "active_parameters": num_active_parameters(spec),
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "vocabulary": spec.vocab_size,
        "context_tokens": spec.max_positions,
        "weights_bytes": num_parameters(spec) * _ITEM_BYTES,
        "kv_bytes_per_token": sum(kind["layers"] * kind["kv_bytes_per_token"] for kind in kinds),
        "kinds": kinds,
    }


def num_active_parameters(spec: ModelSpec) -> int:
    """Those that a token meets: all but those of the experts that it does not pass."""
    num_idle = 0
    for index, count in distinct_layers(spec).items():
        experts = spec.layers[index - 1].mlp
        if isinstance(experts, Experts):
            of_experts = sum(
                t.num_values for t in layer_tensors(spec, index) if t.expert is not None
            )
            one = of_experts // experts.num_experts
            num_idle += count * one * (experts.num_experts - experts.top_k)
    return num_parameters(spec) - num_idle


def _layer(layer: Layer) -> dict[str, Any]:
    mlp = layer.mlp
    return {
        "attention": _attention(layer.attention),
        "mlp": _experts(mlp) if isinstance(mlp, Experts) else _mlp(mlp),
    }


def _attention(attention: Attention | LatentAttention) -> dict[str, Any]:
    return {
        "heads": attention.num_heads,
        "kv_heads": attention.cache_heads,
        "head_dim": attention.cache_dim,
        "latent": isinstance(attention, LatentAttention),
        "window_tokens": attention.window,
    }


def _mlp(mlp: Mlp) -> dict[str, Any]:
    clamped = isinstance(mlp.activation, ClampedSilu)
    activation = "clamped silu" if clamped else mlp.activation
    return {"size": mlp.size, "activation": activation, "gated": mlp.gated}


def _experts(experts: Experts) -> dict[str, Any]:
    return {
        **_mlp(experts.mlp),
        "experts": experts.num_experts,
        "experts_per_token": experts.top_k,
        "shared_size": 0 if experts.shared is None else experts.shared.size,
    }

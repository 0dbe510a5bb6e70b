"""What a model does with a token, as the planner counts it. Torch is not imported here."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from flexport.codecs.compressed import compressed
from flexport.engine.plan import layer_caches
from flexport.engine.stored import packed_layout
from flexport.models.spec import Experts, ModelSpec
from flexport.models.tensors import (
    TensorSpec,
    attention_flops,
    distinct_layers,
    layer_tensors,
    touched_values,
)
from flexport.planner.footprint import LayerCaches
from flexport.planner.work import LayerWork, Matrices, ModelWork

__all__ = ["model_work"]


@lru_cache(maxsize=16)  # it is asked for with every plan
def model_work(spec: ModelSpec, codec: str, published: str | None = None) -> ModelWork:
    """The work of a model whose decoder layers' matrices flexport packs in `codec`.

    `published` names the form that its checkpoint has them packed in; then all of them are.
    """
    kinds = distinct_layers(spec)
    firsts = {spec.layers[first - 1]: number for number, first in enumerate(kinds)}
    return ModelWork(
        layers=tuple(
            _layer_work(spec, first, count, codec, published) for first, count in kinds.items()
        ),
        order=tuple(firsts[layer] for layer in spec.layers),
        head=_matrices(layer_tensors(spec, spec.head_layer), "none", None),
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        codec=published or codec.partition(":")[0],
    )


def _layer_work(
    spec: ModelSpec, layer: int, count: int, codec: str, published: str | None
) -> LayerWork:
    own = spec.layers[layer - 1]
    tensors = layer_tensors(spec, layer)
    dense = [tensor for tensor in tensors if tensor.expert is None]
    experts = own.mlp if isinstance(own.mlp, Experts) else None
    attention = own.attention
    return LayerWork(
        num_layers=count,
        dense=_matrices(dense, codec, published),
        expert=_matrices((t for t in tensors if t.expert == 0), codec, published)
        if experts
        else None,
        num_experts=experts.num_experts if experts else 0,
        top_k=experts.top_k if experts else 0,
        touched_values=touched_values(spec, layer),
        score_flops=attention_flops(spec, layer - 1, 1),
        queries=attention.num_heads // attention.cache_heads,
        window=attention.window,
        caches=_cache_kinds(spec).index(layer_caches(attention, 1)),
    )


def _cache_kinds(spec: ModelSpec) -> list[LayerCaches]:
    """Kinds of caches, in the order of `ModelSizes.caches`."""
    return list(dict.fromkeys(layer_caches(layer.attention, 1) for layer in spec.layers))


def _matrices(tensors: Iterable[TensorSpec], codec: str, published: str | None) -> Matrices:
    plain = packed = 0
    form = compressed(codec)
    for tensor in tensors:
        if tensor.kind not in ("matrix", "operand"):
            continue
        if published is not None or (form is not None and packed_layout(tensor, form) is not None):
            packed += tensor.num_values
        else:
            plain += tensor.num_values
    return Matrices(plain_values=plain, packed_values=packed)

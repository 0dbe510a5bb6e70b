"""Families of models: a Hugging Face config in, a `ModelSpec` out.

A family is a function `spec(config) -> ModelSpec` in a file named after its `model_type`. Third
parties add one through the entry-point group `flexport.models`, whose entries are named after
the `model_type` and point to such a function. Ours need no entry and can't be replaced by one.
"""

from __future__ import annotations

from flexport.models.family import Family, families, spec_of
from flexport.models.shapes import known_config, known_names
from flexport.models.spec import (
    ModelSpec,
    TensorSpec,
    attention_flops,
    flops_per_token,
    kv_bytes_per_token,
    layer_bytes,
    layer_flops,
    layer_tensors,
    num_parameters,
)

__all__ = [
    "Family",
    "ModelSpec",
    "TensorSpec",
    "attention_flops",
    "families",
    "flops_per_token",
    "known_config",
    "known_names",
    "kv_bytes_per_token",
    "layer_bytes",
    "layer_flops",
    "layer_tensors",
    "num_parameters",
    "spec_of",
]

"""Families of models: a Hugging Face config in, a `ModelSpec` out.

A family is a function `spec(config) -> ModelSpec` in a file named after its `model_type`. Third
parties add one through the entry-point group `flexport.models`, whose entries are named after
the `model_type` and point to such a function. Ours need no entry and can't be replaced by one.

The names here are all that such a function needs, and what the rest of flexport asks of a spec; for
families like Llama there is `flexport.models.like_llama`, too.
"""

from __future__ import annotations

from flexport.models.alibi import alibi_slopes
from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.family import Family, about, families, spec_of
from flexport.models.naming import ACTIVATIONS, EXPERT_PARTS, LLAMA_PARTS, checkpoint_names
from flexport.models.rope import Rope, plain_rope, read_rope
from flexport.models.shapes import known_config, known_names
from flexport.models.spec import (
    Attention,
    ClampedSilu,
    Experts,
    Fused,
    HeadNorm,
    LatentAttention,
    Layer,
    Mlp,
    ModelSpec,
    Norm,
)
from flexport.models.summary import num_active_parameters, summary
from flexport.models.tensors import (
    TensorSpec,
    attention_flops,
    kv_bytes_per_token,
    layer_bytes,
    layer_flops,
    layer_tensors,
    num_parameters,
)

__all__ = [
    "ACTIVATIONS",
    "EXPERT_PARTS",
    "LLAMA_PARTS",
    "Attention",
    "ClampedSilu",
    "Config",
    "Experts",
    "Family",
    "Fused",
    "HeadNorm",
    "LatentAttention",
    "Layer",
    "Mlp",
    "ModelSpec",
    "Norm",
    "Rope",
    "TensorSpec",
    "about",
    "alibi_slopes",
    "attention_flops",
    "build_model",
    "checkpoint_names",
    "families",
    "known_config",
    "known_names",
    "kv_bytes_per_token",
    "layer_bytes",
    "layer_flops",
    "layer_tensors",
    "num_active_parameters",
    "num_parameters",
    "plain_rope",
    "read_rope",
    "spec_of",
    "summary",
]

"""GLM-4-0414 and GLM-Z1 (`model_type` "glm4"): GLM-4 with norms behind each half, too.

Source: arXiv:2406.12793, and the fields of transformers' Glm4Config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import glm
from flexport.models.build import build_model
from flexport.models.config import Config
from flexport.models.like_llama import read_norm
from flexport.models.spec import ModelSpec

__all__ = ["spec"]

_PARTS = {
    **glm.PARTS,
    "attention_out_norm": "layers.{i}.post_self_attn_layernorm",
    "mlp_out_norm": "layers.{i}.post_mlp_layernorm",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a GLM4 config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("glm4", config, glm.DEFAULTS)
    layer = replace(glm.read_glm_layer(fields), norms="both")
    layers = [layer] * fields.count("num_hidden_layers")
    return build_model(fields, layers, read_norm(fields), _PARTS)

"""CodeGen (`model_type` "codegen"): GPT-J with one projection, as four cores held it.

Each quarter of the projection has its quarter of the heads' queries, then values, then keys.
Source: arXiv:2203.13474, and the fields of transformers' CodeGenConfig, whose defaults are GPT-J's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models import gptj
from flexport.models.spec import Fused, ModelSpec

__all__ = ["spec"]

_NUM_CORES = 4


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a CodeGen config; raises UnsupportedModel for what flexport does not know."""
    fused = Fused(num_parts=_NUM_CORES, order="qvk")
    return gptj.spec_like("codegen", config, {"qkv": "h.{i}.attn.qkv_proj"}, fused)

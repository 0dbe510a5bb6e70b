"""The text part of Qwen3-VL (`model_type` "qwen3_vl_text"): Qwen3.

Its angles are for three positions of each token, which are one and the same in text. Source:
arXiv:2511.21631, and the fields of transformers' Qwen3VLTextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.qwen3 import DEFAULTS, read_qwen3
from flexport.models.spec import ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    **DEFAULTS,
    "max_position_embeddings": 128000,
    "rope_theta": 5e5,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of such a config; raises UnsupportedModel for what flexport does not know."""
    return read_qwen3(Config("qwen3_vl_text", config, _DEFAULTS))

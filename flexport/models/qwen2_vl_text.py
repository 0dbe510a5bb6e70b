"""The text part of Qwen2-VL and 2.5-VL (`model_type` "qwen2_vl_text"): Qwen2.

Its angles are for three positions of each token, which are one and the same in text. Source:
arXiv:2409.12191, section 2.1, and the fields of transformers' Qwen2VLTextConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.qwen2 import read_qwen2
from flexport.models.spec import ModelSpec

__all__ = ["spec"]

_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "sliding_window": 4096,
    "max_window_layers": 80,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of such a config; raises UnsupportedModel for what flexport does not know."""
    return read_qwen2(Config("qwen2_vl_text", config, _DEFAULTS))

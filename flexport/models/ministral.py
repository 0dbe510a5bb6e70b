"""Ministral (`model_type` "ministral"): Mistral with windows in some layers.

Its configs are Mistral's with layer_types, which our Mistral reads. Source: the fields of
transformers' MinistralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.mistral import DEFAULTS, read_mistral
from flexport.models.spec import ModelSpec

__all__ = ["spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Ministral config; raises UnsupportedModel for what flexport does not know."""
    return read_mistral(Config("ministral", config, DEFAULTS))

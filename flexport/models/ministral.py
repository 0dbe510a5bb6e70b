"""Ministral (`model_type` "ministral"): Mistral with windows in some layers.

Its configs are Mistral's with layer_types, which our Mistral reads. Source: the fields of
transformers' MinistralConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexport.models import mistral
from flexport.models.spec import ModelSpec

__all__ = ["spec"]


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a Ministral config; raises UnsupportedModel for what flexport does not know."""
    return replace(mistral.spec(config), family="ministral")

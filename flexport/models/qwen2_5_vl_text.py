"""The text part of Qwen2.5-VL (`model_type` "qwen2_5_vl_text"), which is Qwen2-VL's."""

from __future__ import annotations

from flexport.models.qwen2_vl_text import spec

__all__ = ["spec"]

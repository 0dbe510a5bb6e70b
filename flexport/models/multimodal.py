"""Models that read images, too: where their text part is, in configs and in checkpoints.

Such a model is run as its text part, on prompts of text alone. That part is a model of another
family: its config lies in text_config, or among the other fields, and its tensors have the names
of its family behind a prefix. The other parts' tensors are left out by name; what has none of
these names is unexpected here as anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from flexport.models.config import Config
from flexport.models.spec import ModelSpec

__all__ = ["MULTIMODAL", "Multimodal", "placed", "text_config"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Multimodal:
    """What is known of a model whose text part is run."""

    text: str
    """The `model_type` of the text part where its config says none."""
    others: tuple[str, ...]
    """What names of the other parts' tensors begin with, perhaps behind "model."."""


_LLAVA = ("vision_tower.", "multi_modal_projector.")
_QWEN = ("visual.",)

MULTIMODAL: Mapping[str, Multimodal] = {
    "gemma3": Multimodal(text="gemma3_text", others=_LLAVA),
    "internvl": Multimodal(text="qwen2", others=_LLAVA),
    "llava": Multimodal(text="llama", others=_LLAVA),
    "llava_next": Multimodal(text="llama", others=(*_LLAVA, "image_newline")),
    "llava_onevision": Multimodal(text="qwen2", others=(*_LLAVA, "image_newline")),
    "mistral3": Multimodal(text="mistral", others=_LLAVA),
    "qwen2_5_vl": Multimodal(text="qwen2_vl_text", others=_QWEN),
    "qwen2_vl": Multimodal(text="qwen2_vl_text", others=_QWEN),
    "qwen3_vl": Multimodal(text="qwen3_vl_text", others=_QWEN),
    "vipllava": Multimodal(text="llama", others=_LLAVA),
}
"""By `model_type` of the whole."""

_PREFIXES = ("language_model.", "model.language_model.", "")
"""Of the text part's names: as published, as newer transformers keep them, with none of their own."""

_OF_THE_WHOLE = ("bos_token_id", "eos_token_id", "pad_token_id")


def text_config(config: Mapping[str, Any], known: Multimodal) -> dict[str, Any]:
    """The config of the text part, with what the whole says of tokens."""
    whole = Config(str(config["model_type"]), config)
    flat = {name: value for name, value in config.items() if name != "model_type"}
    text = dict(whole.mapping("text_config") or flat)
    text.setdefault("model_type", known.text)
    text.update({name: config[name] for name in _OF_THE_WHOLE if whole.has(name)})
    # Where neither says whether the head is tied, the checkpoint does: a head that differs from
    # the token table is not.
    tied = [part["tie_word_embeddings"] for part in (config, text) if "tie_word_embeddings" in part]
    text["tie_word_embeddings"] = True if not tied else True in tied
    return text


def placed(spec: ModelSpec, known: Multimodal) -> ModelSpec:
    """The text part's spec, with the names that its tensors have in a checkpoint of the whole."""
    names = {part: _in_the_whole(own) for part, own in spec.names.items()}
    others = tuple(prefix + name for prefix in ("", "model.") for name in known.others)
    return replace(spec, names=names, unused=(*_in_the_whole(spec.unused), *others))


def _in_the_whole(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(prefix + name for prefix in _PREFIXES for name in names)

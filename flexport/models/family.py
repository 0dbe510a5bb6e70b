"""Which families there are: ours, and those that installed packages add as entry points.

A third party's family is imported only when a model of its `model_type` is opened, so that a
broken one can't hurt the others. Two packages that add the same family are both refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

from flexport.errors import UnsupportedModel
from flexport.models.config import Config
from flexport.models.multimodal import MULTIMODAL, placed, text_config
from flexport.models.spec import ModelSpec

__all__ = ["GROUP", "Family", "about", "families", "spec_of"]

GROUP = "flexport.models"

SpecOf = Callable[[Mapping[str, Any]], ModelSpec]
"""Turns a Hugging Face config into a spec; raises UnsupportedModel, naming the field."""

_OURS = (
    "arcee",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "ernie4_5_moe",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "helium",
    "llama",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "mpt",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen2_vl_text",
    "qwen3",
    "qwen3_moe",
    "qwen3_vl_text",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""Each a module of this package with a function `spec`."""

_SHARED = {"qwen2_5_vl_text": "qwen2_vl_text"}
"""Families that differ from another one in nothing, and its module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family as it is listed: its `model_type` and the package it comes from."""

    model_type: str
    source: str


def families() -> list[Family]:
    """All families, sorted; third parties' are not imported."""
    ours = [Family(model_type=name, source="flexport") for name in (*_OURS, *_SHARED, *MULTIMODAL)]
    theirs = [
        Family(model_type=entry.name, source=_source(entry))
        for entry in entry_points(group=GROUP)
        if entry.name not in (*_OURS, *_SHARED, *MULTIMODAL)
    ]
    return sorted(ours + theirs, key=lambda family: (family.model_type, family.source))


def about(model_type: str) -> str:
    """Which models a family has, in a line; empty where its package does not say.

    Ours say so in their modules' first line, third parties in their package's description.
    """
    if model_type in MULTIMODAL:
        return f"text part of a model that reads images, {MULTIMODAL[model_type].text} by default"
    if model_type in (*_OURS, *_SHARED):
        lines = (_module(model_type).__doc__ or "").splitlines()
        return re.sub(r" \(`model_type` .*?\)", "", "".join(lines[:1])).rstrip(".")
    entries = entry_points(group=GROUP, name=model_type)
    return next((entry.dist.metadata["Summary"] or "" for entry in entries if entry.dist), "")


def spec_of(
    config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec of a Hugging Face config, by its `model_type`.

    Of a model that reads images, too, it is the text part's. The ends in generation_config.json, if
    it names any, win over the config's, as they do in transformers. Raises UnsupportedModel for a
    family or a feature that flexport does not know.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise UnsupportedModel(
            f"the model's config has no model_type (found {model_type!r}); {_listed()}"
        )
    whole = MULTIMODAL.get(model_type)
    if whole is None:
        spec = _spec_of_family(model_type, config)
    else:
        text = text_config(config, whole)
        spec = placed(_spec_of_family(text["model_type"], text), whole)
    if generation_config is None:
        return spec
    ends = Config("generation", generation_config).token_ids("eos_token_id", None)
    return replace(spec, eos_token_ids=ends) if ends else spec


def _spec_of_family(model_type: str, config: Mapping[str, Any]) -> ModelSpec:
    for name, required in _OF_ALL.items():
        Config(model_type, config).refuse_unless(name, required)
    build = _ours(model_type) if model_type in (*_OURS, *_SHARED) else _theirs(model_type)
    spec = build(config)
    if not isinstance(spec, ModelSpec):
        raise UnsupportedModel(
            f"the family {model_type!r} gave a {type(spec).__name__} in place of a ModelSpec"
        )
    return spec


_OF_ALL: Mapping[str, object] = {
    "is_causal": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "per_layer_config": {},
}
"""Fields that any config may have, and the only values that can be run."""


def _ours(model_type: str) -> SpecOf:
    build: SpecOf = _module(model_type).spec
    return build


def _module(model_type: str) -> ModuleType:
    return import_module(f"flexport.models.{_SHARED.get(model_type, model_type)}")


def _theirs(model_type: str) -> SpecOf:
    entries = [entry for entry in entry_points(group=GROUP) if entry.name == model_type]
    if not entries:
        close = get_close_matches(model_type, {family.model_type for family in families()})
        hint = f"close to it: {', '.join(close)}; " if close else ""
        raise UnsupportedModel(
            f"no model family {model_type!r}; {hint}{_listed()}. A package can add one through "
            f"the entry-point group {GROUP!r}"
        )
    if len(entries) > 1:
        sources = ", ".join(sorted(_source(entry) for entry in entries))
        raise UnsupportedModel(
            f"the family {model_type!r} is added by several packages ({sources}); keep one"
        )
    try:
        build = entries[0].load()
    except Exception as error:  # a stranger's import may raise anything
        raise UnsupportedModel(
            f"the family {model_type!r} of {_source(entries[0])} can't be imported: {error!r}"
        ) from error
    if not callable(build):
        raise UnsupportedModel(
            f"the family {model_type!r} of {_source(entries[0])} is {build!r}, not a function"
        )
    spec_function: SpecOf = build
    return spec_function


def _source(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _listed() -> str:
    return (
        f"`flexport models` lists the {len({family.model_type for family in families()})} there are"
    )

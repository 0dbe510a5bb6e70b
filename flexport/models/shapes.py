"""Configs of published models, so that `--load-format dummy` needs neither network nor files.

Each is the part of the Hugging Face config that decides sizes and arithmetic, as
`flexport.models.spec_of` takes it.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from flexport.models.published import configs

__all__ = ["known_config", "known_names"]

_CONFIGS = dict(configs())
_FULL_NAMES = {name.rpartition("/")[2].lower(): name for name in _CONFIGS}


def known_config(name: str) -> dict[str, Any] | None:
    """A copy of the config of a published model, or None.

    Case does not matter, and the organisation may be left out.
    """
    organisation, _, short = name.rpartition("/")
    full = _FULL_NAMES.get(short.lower())
    if full is None or organisation.lower() not in ("", full.partition("/")[0].lower()):
        return None
    return deepcopy(_CONFIGS[full])


def known_names() -> tuple[str, ...]:
    """Hub ids of the models that `known_config` knows, smallest first within a family."""
    return tuple(_CONFIGS)

"""Run a whole file of prompts through a language model that does not fit in memory.

The public names are imported when they are first used, so that `import flexport`, and with it
`flexport --help`, needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flexport.process import prepare

if TYPE_CHECKING:
    from flexport.engine.llm import LLM
    from flexport.engine.model import Model
    from flexport.policy import Policy, Split
    from flexport.records import RequestOutput, SamplingParams

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Model",
    "Policy",
    "RequestOutput",
    "SamplingParams",
    "Split",
    "__version__",
]

_HOMES = {
    "LLM": "flexport.engine.llm",
    "Model": "flexport.engine.model",
    "Policy": "flexport.policy",
    "RequestOutput": "flexport.records",
    "SamplingParams": "flexport.records",
    "Split": "flexport.policy",
}
"""The module in which each public name is defined."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'flexport' has no attribute {name!r}")
    prepare()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

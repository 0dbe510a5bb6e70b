"""Configs of published models, so that `--load-format dummy` needs neither network nor files.

Each is the part of the Hugging Face config that decides sizes and arithmetic, as
`flexport.models.spec_of` takes it. Sources: arXiv:2205.01068 table 1 (OPT), arXiv:2212.12017
(OPT-IML), arXiv:2211.09085 table 5 (Galactica), and the config.json of each repository.
"""

from __future__ import annotations

from typing import Any

__all__ = ["known_config", "known_names"]

_ORGANISATION = "facebook/"

_SIZES = {
    # layers, heads, hidden size
    "125m": (12, 12, 768),
    "350m": (24, 16, 1024),
    "1.3b": (24, 32, 2048),
    "2.7b": (32, 32, 2560),
    "6.7b": (32, 32, 4096),
    "13b": (40, 40, 5120),
    "30b": (48, 56, 7168),
    "66b": (64, 72, 9216),
    "120b": (96, 80, 10240),
    "175b": (96, 96, 12288),
}

_OPT_SIZES = ("125m", "350m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b")
_OPT_IML_SIZES = ("1.3b", "30b")
_GALACTICA_SIZES = ("125m", "1.3b", "6.7b", "30b", "120b")
_GALACTICA_WITHOUT_BIASES = ("30b", "120b")
"""The smaller ones were published with biases and norm weights, the larger ones without."""


def _config(size: str, **rest: Any) -> dict[str, Any]:
    num_layers, num_heads, hidden_size = _SIZES[size]
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_size": hidden_size,
        "word_embed_proj_dim": hidden_size,
        "ffn_dim": 4 * hidden_size,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "vocab_size": 50272,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        **rest,
    }


def _opt(size: str) -> dict[str, Any]:
    if size == "350m":
        return _config(size, word_embed_proj_dim=512, do_layer_norm_before=False)
    return _config(size)


def _galactica(size: str) -> dict[str, Any]:
    affine = size not in _GALACTICA_WITHOUT_BIASES
    return _config(
        size,
        vocab_size=50000,
        bos_token_id=0,
        activation_function="gelu",
        enable_bias=affine,
        layer_norm_elementwise_affine=affine,
    )


_CONFIGS: dict[str, dict[str, Any]] = {
    **{f"opt-{size}": _opt(size) for size in _OPT_SIZES},
    **{f"opt-iml-{size}": _opt(size) for size in _OPT_IML_SIZES},
    **{f"opt-iml-max-{size}": _opt(size) for size in _OPT_IML_SIZES},
    **{f"galactica-{size}": _galactica(size) for size in _GALACTICA_SIZES},
}


def known_config(name: str) -> dict[str, Any] | None:
    """A copy of the config of a published model, or None; "facebook/" may be left out."""
    config = _CONFIGS.get(name.removeprefix(_ORGANISATION))
    return None if config is None else dict(config)


def known_names() -> tuple[str, ...]:
    """Hub ids of the models that `known_config` knows, smallest first within a family."""
    return tuple(_ORGANISATION + name for name in _CONFIGS)

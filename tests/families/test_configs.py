"""A config means to us what transformers makes of it, in whatever form, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_families import VARIANTS
from transformers import AutoConfig

from flexport.errors import UnsupportedModel
from flexport.models import spec_of
from flexport.models.multimodal import MULTIMODAL

ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "activation")

PUBLISHED: dict[str, dict[str, Any]] = {
    # name: what a published config.json says, but for sizes
    "mistral-7b-v0.1": {
        "model_type": "mistral",
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    },
    "mistral-7b-v0.3": {
        "model_type": "mistral",
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "vocab_size": 32768,
    },
    "llama-3.1": {
        "model_type": "llama",
        "attention_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "llama with linear scaling of old": {
        "model_type": "llama",
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "max_window_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "use_mrope": False,
    },
    "qwen2.5 with yarn": {
        "model_type": "qwen2",
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "max_window_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_act": "gelu",
        "hidden_activation": None,
        "head_dim": 256,
        "num_key_value_heads": 1,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "sliding_window_size": 4096,
    },
    "gemma-3-1b": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "num_key_value_heads": 1,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "gemma-3-4b": {
        "model_type": "gemma3",
        "eos_token_id": [1, 106],
        "mm_tokens_per_image": 256,
        "text_config": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "model_type": "gemma3_text",
            "num_hidden_layers": 34,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024,
        },
    },
    "phi-3-mini-4k": {
        "model_type": "phi3",
        "embd_pdrop": 0.0,
        "original_max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 2047,
    },
    "phi-3-mini-128k": {
        "model_type": "phi3",
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_scaling": {
            "long_factor": [1.0 + index for index in range(48)],
            "short_factor": [1.0 + index / 48 for index in range(48)],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "long_factor": [1.0 + index for index in range(48)],
            "short_factor": [1.0] * 48,
            "type": "longrope",
        },
        "tie_word_embeddings": True,
    },
    "olmo-2-7b": {"model_type": "olmo2", "rope_scaling": None, "rope_theta": 500000},
    "olmo-3-7b": {
        "model_type": "olmo3",
        "max_position_embeddings": 65536,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
    },
    "granite-3.0-8b": {
        "model_type": "granite",
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "logits_scaling": 16.0,
        "residual_multiplier": 0.22,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": True,
    },
    "command-r": {
        "model_type": "cohere",
        "logit_scale": 0.0625,
        "model_max_length": 131072,
        "pretraining_tp": 1,
        "rope_theta": 8000000.0,
        "use_qk_norm": False,
    },
    "command-r7b": {
        "model_type": "cohere2",
        "layer_switch": 4,
        "logit_scale": 0.25,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "use_parallel_block": True,
    },
    "glm-4-9b-chat": {"model_type": "glm", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    "glm-4-9b-0414": {"model_type": "glm4", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
    "smollm3-3b": {
        "model_type": "smollm3",
        "layer_types": ["full_attention"] * 36,
        "max_window_layers": 28,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "exaone-4.0-32b": {
        "model_type": "exaone4",
        "head_dim": 128,
        "layer_types": ["sliding_attention"] * 31 + ["full_attention"],
        "rope_scaling": {
            "factor": 16.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 1000000,
        "sliding_window": 4096,
        "sliding_window_pattern": "LLLG",
        "max_position_embeddings": 131072,
    },
    "llava-1.5-7b": {
        "model_type": "llava",
        "pad_token_id": 32001,
        "text_config": {
            "max_position_embeddings": 4096,
            "model_type": "llama",
            "rms_norm_eps": 1e-05,
            "vocab_size": 32064,
        },
        "tie_word_embeddings": False,
    },
    "qwen2.5-vl-7b": {
        "model_type": "qwen2_5_vl",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"},
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vision_config": {"depth": 32, "model_type": "qwen2_5_vl"},
    },
}


def as_transformers_has_it(config: dict[str, Any]) -> dict[str, Any]:
    """All fields of a config, as transformers would write it today."""
    fields = {name: value for name, value in config.items() if name != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    written: dict[str, Any] = json.loads(theirs.to_json_string(use_diff=False))
    return written


WITH_DEFAULTS = [
    *(family for family in VARIANTS if family not in MULTIMODAL),
    "qwen2_5_vl_text",
    "qwen2_vl_text",
    "qwen3_vl_text",
]

WITHOUT_DEFAULTS: dict[str, dict[str, Any]] = {
    # what transformers has no default for, and can't be run without
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "num_experts_per_tok": 6},
}


def shortest(family: str) -> dict[str, Any]:
    """A config with as few fields as the family can have."""
    return {"model_type": family, **WITHOUT_DEFAULTS.get(family, {})}


@pytest.mark.parametrize("family", WITH_DEFAULTS)
def test_a_config_without_fields_has_the_defaults_of_transformers(family):
    config = shortest(family)

    assert spec_of(config) == spec_of(as_transformers_has_it(config))


@pytest.mark.parametrize(
    ("family", "field"),
    [(family, field) for family, fields in WITHOUT_DEFAULTS.items() for field in fields],
)
def test_a_field_without_a_default_is_asked_for_by_name(family, field):
    config = {name: value for name, value in shortest(family).items() if name != field}

    with pytest.raises(UnsupportedModel, match=field):
        spec_of(config)


@pytest.mark.parametrize("config", list(PUBLISHED.values()), ids=list(PUBLISHED))
def test_a_published_config_means_what_transformers_makes_of_it(config):
    assert spec_of(config) == spec_of(as_transformers_has_it(config))


@pytest.mark.parametrize(
    ("family", "field", "found", "default"),
    [
        ("mistral", "sliding_window", lambda spec: spec.layers[0].attention.window, 4096),
        ("gemma2", "attn_logit_softcapping", lambda spec: spec.layers[0].attention.soft_cap, 50.0),
        ("gemma2", "final_logit_softcapping", lambda spec: spec.logit_cap, 30.0),
        ("llama", "bos_token_id", lambda spec: spec.bos_token_id, 1),
        ("llama", "eos_token_id", lambda spec: spec.eos_token_ids or None, (2,)),
    ],
)
def test_a_null_is_none_of_what_there_need_not_be(family, field, found, default):
    absent, null = spec_of({"model_type": family}), spec_of({"model_type": family, field: None})

    assert (found(absent), found(null)) == (default, None)


def test_what_the_whole_says_of_tokens_is_for_its_text_part():
    spec = spec_of({**PUBLISHED["gemma-3-4b"], "pad_token_id": 7})

    assert (spec.bos_token_id, spec.eos_token_ids, spec.pad_token_id) == (2, (1, 106), 7)


def test_longrope_goes_by_its_first_name_too():
    config = PUBLISHED["phi-3-mini-128k"]
    first = {**config, "rope_scaling": {**config["rope_scaling"], "type": "su"}}

    assert spec_of(first) == spec_of(config)


def whole_configs() -> Iterator[Any]:
    """Of each family, its shortest one and its first variant's, with all fields."""
    for family in WITH_DEFAULTS:
        yield pytest.param(as_transformers_has_it(shortest(family)), id=family)
    for family, (base, variants) in VARIANTS.items():
        first = {"model_type": family, **base, **next(iter(variants.values()))}
        yield pytest.param(as_transformers_has_it(first), id=f"{family}, tiny")


def changed(config: dict[str, Any], names: tuple[str, ...], value: str) -> dict[str, Any]:
    """The config with the fields of these names changed, in its parts too, but not in what sees."""
    return {
        name: value
        if name in names and not isinstance(old, dict)
        else changed(old, names, value)
        if isinstance(old, dict) and name != "vision_config"
        else old
        for name, old in config.items()
    }


@pytest.mark.parametrize("config", list(whole_configs()))
@pytest.mark.parametrize("names", [ACTIVATIONS, ("rope_type",)], ids=["activation", "rope type"])
def test_what_no_one_has_heard_of_is_refused_by_name(config, names):
    strange = changed(config, names, "warp")
    if strange == config:
        pytest.skip("its configs have no such field")

    with pytest.raises(UnsupportedModel, match="warp") as refusal:
        spec_of(strange)

    assert any(name in str(refusal.value) for name in names)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "gemma", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ({"model_type": "gemma", "hidden_activation": "gelu"}, "hidden_activation"),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    (
        {"model_type": "gemma3_text", "use_bidirectional_attention": True},
        "use_bidirectional_attention",
    ),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ({"model_type": "phi3", "lm_head_bias": True}, "lm_head_bias"),
    ({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
    ({"model_type": "olmo2", "clip_qkv": 8.0}, "clip_qkv"),
    ({"model_type": "cohere", "use_parallel_block": False}, "use_parallel_block"),
    ({"model_type": "cohere2", "position_embedding_type": "alibi"}, "position_embedding_type"),
    ({"model_type": "cohere2", "use_qk_norm": True}, "use_qk_norm"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 32}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 32}, "layer_types"),
    ({"model_type": "llama", "num_key_value_heads": 5}, "num_key_value_heads"),
    ({"model_type": "llama", "head_dim": 7}, "7 features"),
    ({"model_type": "llama", "partial_rotary_factor": 0.0}, "0 of a head's 128 features"),
    ({"model_type": "deepseek_v3", "rope_scaling": {"type": "warp", "mscale_all_dim": 1}}, "warp"),
    ({"model_type": "llava", "text_config": {"model_type": "rwkv"}}, "rwkv"),
    ({"model_type": "llama", "is_causal": False}, "is_causal"),
    ({"model_type": "llama", "is_encoder_decoder": True}, "is_encoder_decoder"),
    ({"model_type": "llama", "per_layer_config": {"1": {"head_dim": 64}}}, "per_layer_config"),
    ({"model_type": "llava", "text_config": {"add_cross_attention": True}}, "add_cross_attention"),
]


@pytest.mark.parametrize(("config", "named"), REFUSED, ids=str)
def test_what_flexport_can_not_run_is_refused_by_name(config, named):
    with pytest.raises(UnsupportedModel, match=named):
        spec_of(config)

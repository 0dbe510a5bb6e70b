"""Tiny models of every family, each with the features that its configs can switch on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flexport.testing.families.tiny import Variant, make

__all__ = ["VARIANTS", "Variant", "make", "variants"]

LLAMA_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

OPT_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
}

GPT_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

GPTJ_SIZES: dict[str, Any] = {**GPT_SIZES, "rotary_dim": 4}

NEOX_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}

BLOOM_SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "n_layer": 3, "n_head": 4}

FALCON_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

FALCON_40B: dict[str, Any] = {"new_decoder_architecture": True, "num_kv_heads": 2}

# transformers rounds ALiBi's slopes to bfloat16, which leaves those of 4 heads as they are.
FALCON_RW: dict[str, Any] = {
    "alibi": True,
    "multi_query": False,
    "parallel_attn": False,
    "bias": True,
}

MPT_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "d_model": 32,
    "n_layers": 3,
    "n_heads": 4,
    "max_seq_len": 64,
}

GEMMA_SIZES: dict[str, Any] = {**LLAMA_SIZES, "head_dim": 12, "query_pre_attn_scalar": 20}
MIXTRAL_SIZES: dict[str, Any] = {**LLAMA_SIZES, "num_local_experts": 5, "num_experts_per_tok": 2}

QWEN_MOE_SIZES: dict[str, Any] = {
    **LLAMA_SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
}

GPT_OSS_SIZES: dict[str, Any] = {**MIXTRAL_SIZES, "head_dim": 12, "sliding_window": 6}

BALANCED_SIZES: dict[str, Any] = {
    **LLAMA_SIZES,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
}

DEEPSEEK_SIZES: dict[str, Any] = {
    **BALANCED_SIZES,
    "num_key_value_heads": 4,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-2,  # that of compressed vectors is another, in no config
}

SHORT_YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 16}

OWN_HEAD: dict[str, Any] = {"tie_word_embeddings": False}
TIED_HEAD: dict[str, Any] = {"tie_word_embeddings": True}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    """Rotary positions, as configs ask for them."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **fields}}


def mpt_attention(**fields: Any) -> dict[str, Any]:
    """What MPT's configs say of attention."""
    return {"attn_config": fields}


def windows(size: int, *which: int) -> dict[str, Any]:
    """A window in three layers; `which` has a 1 for those that it is for."""
    types = ["sliding_attention" if own else "full_attention" for own in which]
    return {"sliding_window": size, **({"layer_types": types} if types else {})}


def longrope(original: int, **fields: Any) -> dict[str, Any]:
    """LongRoPE of heads with 8 features; rows beyond `original` tokens are long."""
    short, long = [1.0, 1.1, 1.3, 1.6], [1.0, 2.0, 5.0, 9.0]
    return {
        "original_max_position_embeddings": original,
        **rope("longrope", short_factor=short, long_factor=long, **fields),
    }


def sees(kind: str | None = None, **fields: Any) -> dict[str, Any]:
    """A tiny vision tower, which nothing asks to look."""
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    own = {} if kind is None else {"model_type": kind}
    return {"vision_config": {**own, **sizes, **fields}}


def reads(kind: str | None = None, **fields: Any) -> dict[str, Any]:
    """The text part of a model that sees."""
    own = {} if kind is None else {"model_type": kind}
    return {"text_config": {**own, **LLAMA_SIZES, **fields}}


THREE_POSITIONS = rope("default", mrope_section=[1, 1, 2])

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    # family: what all its variants have, and what each of them changes
    "llama": (
        LLAMA_SIZES,
        {
            "grouped heads, a head of its own": OWN_HEAD,
            "tied head": TIED_HEAD,
            "biases, wide heads": {"attention_bias": True, "mlp_bias": True, "head_dim": 12},
            "as many key heads": {"num_key_value_heads": 4},
            "linear rope": rope("linear", factor=4.0),
            "dynamic rope": {"max_position_embeddings": 20, **rope("dynamic", factor=4.0)},
            "llama3 rope": rope(
                "llama3",
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position_embeddings=16,
            ),
            "yarn rope": rope("yarn", factor=4.0, original_max_position_embeddings=16),
            "yarn rope, untruncated": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=16,
                truncate=False,
                beta_fast=16.0,
                attention_factor=1.1,
            ),
        },
    ),
    "gemma3": (
        {**sees("siglip_vision_model"), "mm_tokens_per_image": 4},
        {
            "text part": reads(head_dim=12, **windows(6, 1, 0, 1)),
            "text part, a head of its own": {
                **reads(head_dim=12, **windows(6, 1, 0, 1), **OWN_HEAD),
                **OWN_HEAD,
            },
        },
    ),
    "internvl": (
        sees(image_size=[8, 8], patch_size=[4, 4]),
        {"text part": reads("qwen3", head_dim=8)},
    ),
    "llava": (
        sees("clip_vision_model"),
        {"text part": reads("llama"), "text part, tied head": reads("qwen2", **TIED_HEAD)},
    ),
    "llava_next": (
        {**sees("clip_vision_model"), "image_grid_pinpoints": [[8, 8]]},
        {"text part": reads("mistral", **windows(9))},
    ),
    "llava_onevision": (
        {**sees("siglip_vision_model"), "image_grid_pinpoints": [[8, 8]]},
        {"text part": reads("qwen2")},
    ),
    "mistral3": (
        sees("pixtral"),
        {
            "text part, tied by default": reads("mistral"),
            "text part, growing queries": {
                **reads(
                    "ministral3",
                    head_dim=8,
                    **rope(
                        "yarn",
                        factor=4.0,
                        original_max_position_embeddings=8,
                        llama_4_scaling_beta=0.3,
                    ),
                ),
                **OWN_HEAD,
            },
        },
    ),
    "qwen2_vl": (
        sees(depth=1, embed_dim=16, hidden_size=32, num_heads=2),
        {"text part": reads(**THREE_POSITIONS)},
    ),
    "qwen2_5_vl": (
        sees(depth=1, out_hidden_size=32, num_heads=2, fullatt_block_indexes=[0]),
        {"text part": reads(**THREE_POSITIONS)},
    ),
    "qwen3_vl": (
        sees(
            depth=1,
            out_hidden_size=32,
            num_heads=2,
            deepstack_visual_indexes=[0],
            num_position_embeddings=16,
        ),
        {"text part": reads(head_dim=8, **THREE_POSITIONS)},
    ),
    "vipllava": (
        sees("clip_vision_model"),
        {"text part": reads("llama")},
    ),
    "mistral": (
        LLAMA_SIZES,
        {
            "window": windows(9),
            "no window": {"sliding_window": None},
            "wide heads": {"head_dim": 12, **windows(16)},
        },
    ),
    "ministral": (
        {**LLAMA_SIZES, "head_dim": 12},
        {
            "mixed windows": windows(6, 0, 1, 1),
            "windows": windows(9),
        },
    ),
    "ministral3": (
        {**LLAMA_SIZES, "head_dim": 8},
        {
            "growing queries": rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=8,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.3,
            ),
            "growing queries, window": {
                **rope(
                    "yarn",
                    factor=4.0,
                    original_max_position_embeddings=16,
                    llama_4_scaling_beta=0.1,
                ),
                **windows(11),
            },
        },
    ),
    "qwen2": (
        LLAMA_SIZES,
        {
            "no windows": {},
            "windows from a layer on": {
                "use_sliding_window": True,
                "max_window_layers": 1,
                **windows(7),
            },
            "mixed windows, tied head": {
                "use_sliding_window": True,
                **windows(5, 1, 0, 1),
                **TIED_HEAD,
            },
        },
    ),
    "qwen3": (
        {**LLAMA_SIZES, "head_dim": 12},
        {
            "no windows": {},
            "biases": {"attention_bias": True},
            "windows from a layer on": {
                "use_sliding_window": True,
                "max_window_layers": 2,
                **windows(7),
            },
            "yarn rope, tied head": {
                **rope("yarn", factor=4.0, original_max_position_embeddings=16),
                **TIED_HEAD,
            },
        },
    ),
    "gemma": (
        {**LLAMA_SIZES, "head_dim": 12},
        {
            "2b": {"num_key_value_heads": 1},
            "7b, gelu that means tanh": {"num_key_value_heads": 4, "hidden_act": "gelu"},
            "biases, a head of its own": {"attention_bias": True, **OWN_HEAD},
        },
    ),
    "gemma2": (
        {**GEMMA_SIZES, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
        {
            "caps, every second layer": windows(8),
            "no caps, mixed windows": {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                **windows(5, 0, 1, 1),
            },
        },
    ),
    "gemma3_text": (
        GEMMA_SIZES,
        {
            "two bases, mixed windows": {
                **windows(8, 1, 0, 1),
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                },
            },
            "published form": {
                "sliding_window": 8,
                "sliding_window_pattern": 3,
                "rope_theta": 1e4,
                "rope_local_base_freq": 30.0,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            "capped logits": {"final_logit_softcapping": 3.0, **windows(8, 1, 1, 0)},
        },
    ),
    "phi3": (
        LLAMA_SIZES,
        {
            "mini-4k": windows(10),
            "no window": {},
            "short and long rows": longrope(32),
            "short and long rows, a factor": longrope(32, factor=3.0),
            "short rows, partial": {
                "hidden_size": 48,
                **longrope(64, attention_factor=1.2, partial_rotary_factor=2 / 3),
            },
            "phi-4-mini": {"hidden_size": 64, **rope("default", partial_rotary_factor=0.75)},
        },
    ),
    "olmo2": (
        LLAMA_SIZES,
        {
            "norms behind": {},
            "as many key heads, biases": {"num_key_value_heads": 4, "attention_bias": True},
        },
    ),
    "olmo3": (
        LLAMA_SIZES,
        {
            "scaled without windows": {
                **windows(7, 1, 0, 1),
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {
                        "rope_type": "yarn",
                        "rope_theta": 1e4,
                        "factor": 4.0,
                        "original_max_position_embeddings": 16,
                    },
                },
            },
            "published form": {
                **windows(7, 1, 1, 0),
                "rope_theta": 1e4,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 16,
                },
            },
        },
    ),
    "granite": (
        LLAMA_SIZES,
        {
            "multipliers": {
                "embedding_multiplier": 1.7,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.6,
                "logits_scaling": 0.3,
            },
            "biases, tied head": {"attention_bias": True, "mlp_bias": True, **TIED_HEAD},
        },
    ),
    "cohere": (
        {**LLAMA_SIZES, "logit_scale": 1.5},
        {
            "command-r": {},
            "command-r-plus": {"use_qk_norm": True},
            "biases, a head of its own": {"attention_bias": True, **OWN_HEAD},
        },
    ),
    "cohere2": (
        {**LLAMA_SIZES, "logit_scale": 1.5},
        {
            "mixed windows": windows(7, 1, 0, 1),
            "published form": {"sliding_window": 9, "sliding_window_pattern": 2},
        },
    ),
    "glm": (
        {**LLAMA_SIZES, "head_dim": 8, "rms_norm_eps": 1e-6},
        {
            "partial rope": {},
            "no biases, whole heads turn": {"attention_bias": False, "partial_rotary_factor": 1.0},
        },
    ),
    "glm4": (
        {**LLAMA_SIZES, "head_dim": 8, "rms_norm_eps": 1e-6},
        {
            "norms on both sides": {},
            "no biases, tied head": {"attention_bias": False, **TIED_HEAD},
        },
    ),
    "smollm3": (
        LLAMA_SIZES,
        {
            "every second layer": {"no_rope_layer_interval": 2},
            "listed layers": {"no_rope_layers": [0, 1, 1], **OWN_HEAD},
            "windows": {
                "no_rope_layers": [1, 0, 1],
                "use_sliding_window": True,
                "attention_bias": True,
                "mlp_bias": True,
                **windows(7),
            },
        },
    ),
    "seed_oss": (
        {**LLAMA_SIZES, "head_dim": 12},
        {
            "biases": {},
            "all biases": {"attention_out_bias": True, "mlp_bias": True},
            "no biases": {"attention_bias": False},
        },
    ),
    "exaone4": (
        LLAMA_SIZES,
        {
            "32b": windows(7, 1, 0, 1),
            "1.2b": {"sliding_window": None, "layer_types": ["full_attention"] * 3, **TIED_HEAD},
            "every second layer": {"sliding_window": 9, "sliding_window_pattern": 2},
        },
    ),
    "helium": (
        {**LLAMA_SIZES, "head_dim": 8},
        {
            "neighbours turn": {},
            "biases": {"attention_bias": True, "mlp_bias": True},
        },
    ),
    "arcee": (
        LLAMA_SIZES,
        {
            "squared relu": {},
            "biases": {"attention_bias": True, "mlp_bias": True},
        },
    ),
    "opt": (
        OPT_SIZES,
        {
            "125m": {},
            "350m": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
            "2.7b (uneven heads)": {"hidden_size": 40, "num_attention_heads": 5},
            "galactica-6.7b": {"activation_function": "gelu"},
            "galactica-30b": {
                "activation_function": "gelu",
                "enable_bias": False,
                "layer_norm_elementwise_affine": False,
            },
            "no biases, norms with weights": {"enable_bias": False},
            "norms without weights after": {
                "layer_norm_elementwise_affine": False,
                "do_layer_norm_before": False,
            },
            "projected, norms before": {"word_embed_proj_dim": 48},
            "final norm removed": {"_remove_final_layer_norm": True},
            "head of its own": OWN_HEAD,
            "gelu by tanh": {"activation_function": "gelu_new"},
            "silu": {"activation_function": "silu"},
        },
    ),
    "gpt2": (
        GPT_SIZES,
        {
            "small": {},
            "scale by layer": {"scale_attn_by_inverse_layer_idx": True},
            "no scale, relu": {"scale_attn_weights": False, "activation_function": "relu"},
            "narrow mlp, head of its own": {"n_inner": 40, **OWN_HEAD},
            "upcast": {"reorder_and_upcast_attn": True, "layer_norm_epsilon": 1e-3},
        },
    ),
    "gptj": (
        GPTJ_SIZES,
        {
            "6b": {},
            "all of a head turns": {"rotary_dim": 8},
            "wide mlp, tied head": {"n_inner": 144, **TIED_HEAD},
            "uneven share": {"n_embd": 48, "rotary_dim": 10, "activation_function": "gelu"},
        },
    ),
    "codegen": (
        GPTJ_SIZES,
        {
            "350m": {},
            "two heads a core": {"n_embd": 64, "n_head": 8, "rotary_dim": 6},
            "narrow mlp, tied head": {"n_inner": 40, **TIED_HEAD},
        },
    ),
    "gpt_neox": (
        NEOX_SIZES,
        {
            "20b": {},
            "one after the other": {"use_parallel_residual": False},
            "no attention biases": {"attention_bias": False},
            "tied head, gelu by tanh": {**TIED_HEAD, "hidden_act": "gelu_fast"},
            "all of a head turns": rope("default", partial_rotary_factor=1.0),
            "linear rope, other base": {
                "rope_parameters": {
                    "rope_type": "linear",
                    "rope_theta": 5e3,
                    "factor": 4.0,
                    "partial_rotary_factor": 0.5,
                }
            },
        },
    ),
    "bloom": (
        BLOOM_SIZES,
        {
            "560m": {},
            "176b (heads no power of two)": {"hidden_size": 56, "n_head": 7},
            "head of its own": OWN_HEAD,
        },
    ),
    "falcon": (
        FALCON_SIZES,
        {
            "7b": {},
            "7b with biases, untied": {"bias": True, **OWN_HEAD},
            "40b": FALCON_40B,
            "11b (one norm)": {**FALCON_40B, "num_ln_in_parallel_attn": 1, **OWN_HEAD},
            "180b with biases": {**FALCON_40B, "bias": True, "activation": "gelu_new"},
            "rw-1b": FALCON_RW,
            "rw, parallel": {**FALCON_RW, "parallel_attn": True, "bias": False},
            "rotary, all key heads": {"multi_query": False, "ffn_hidden_size": 80},
            "7b with alibi, one after the other": {
                "alibi": True,
                "parallel_attn": False,
                "layer_norm_epsilon": 1e-3,
            },
            "7b, linear rope": rope("linear", factor=4.0),
        },
    ),
    "mpt": (
        MPT_SIZES,
        {
            "7b": {},
            "storywriter (clipped)": mpt_attention(clip_qkv=0.5),
            "heads no power of two": {"d_model": 48, "n_heads": 6},
            "scaled otherwise, head of its own": {**mpt_attention(softmax_scale=0.2), **OWN_HEAD},
        },
    ),
    "phi": (
        NEOX_SIZES,
        {
            "1.5": {},
            "grouped heads, tied head": {"num_key_value_heads": 2, **TIED_HEAD},
            "norms of heads": {"qk_layernorm": True},
            "all of a head turns, gelu": {
                **rope("default", partial_rotary_factor=1.0),
                "hidden_act": "gelu",
            },
        },
    ),
    "stablelm": (
        {**NEOX_SIZES, "num_key_value_heads": 4},
        {
            "3b": {},
            "2-1.6b": {"use_qkv_bias": True},
            "2-12b": {
                "num_key_value_heads": 2,
                "qk_layernorm": True,
                "use_parallel_residual": True,
            },
            "tied head, half of a head turns": {
                **rope("default", partial_rotary_factor=0.5),
                **TIED_HEAD,
            },
            "norms of heads, gelu": {"qk_layernorm": True, "hidden_act": "gelu"},
        },
    ),
    "starcoder2": (
        {**NEOX_SIZES, "num_key_value_heads": 2},
        {
            "no window": {},
            "3b": {
                "sliding_window": 9,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
            },
            "no biases, untied": {"use_bias": False, **OWN_HEAD},
            "wide heads, gelu": {"head_dim": 12, "hidden_act": "gelu"},
        },
    ),
    "mixtral": (
        MIXTRAL_SIZES,
        {
            "the best two": {},
            "a window, one expert, wide heads": {
                "sliding_window": 7,
                "num_experts_per_tok": 1,
                "head_dim": 12,
            },
            "all experts, tied head": {"num_experts_per_tok": 5, **TIED_HEAD},
        },
    ),
    "qwen2_moe": (
        {**QWEN_MOE_SIZES, "shared_expert_intermediate_size": 28},
        {
            "a shared expert": {},
            "shares of their sum, no biases": {"norm_topk_prob": True, "qkv_bias": False},
            "experts in every second layer": {"decoder_sparse_step": 2},
            "a layer without experts": {"mlp_only_layers": [1]},
            "a window in the middle": {"use_sliding_window": True, **windows(5, 0, 1, 0)},
        },
    ),
    "qwen3_moe": (
        QWEN_MOE_SIZES,
        {
            "norms of each head": {},
            "shares of their sum, biases": {"norm_topk_prob": True, "attention_bias": True},
            "some layers without experts": {"decoder_sparse_step": 2, "mlp_only_layers": [2]},
            "a window": {"use_sliding_window": True, "sliding_window": 6, "head_dim": 12},
        },
    ),
    "olmoe": (
        {key: value for key, value in QWEN_MOE_SIZES.items() if key != "moe_intermediate_size"},
        {
            "norms of all heads": {},
            "clipped": {"clip_qkv": 0.7},
            "shares of their sum, biases": {"norm_topk_prob": True, "attention_bias": True},
        },
    ),
    "gpt_oss": (
        GPT_OSS_SIZES,
        {
            "a window in every second layer": rope("yarn", truncate=False, **SHORT_YARN),
            "its own rope": {},
            "other layers, gate and bias": {
                **windows(5, 0, 1, 1),
                "swiglu_limit": 0.5,
                "swiglu_alpha": 1.2,
                "attention_bias": False,
            },
        },
    ),
    "granitemoe": (
        MIXTRAL_SIZES,
        {
            "four multipliers": {
                "embedding_multiplier": 3.0,
                "attention_multiplier": 0.2,
                "residual_multiplier": 0.4,
                "logits_scaling": 2.0,
            },
            "tied head, biases": {"attention_bias": True, "num_experts_per_tok": 3, **TIED_HEAD},
        },
    ),
    "deepseek_v2": (
        DEEPSEEK_SIZES,
        {
            "lite": {
                "q_lora_rank": None,
                **rope("yarn", mscale=0.7, mscale_all_dim=0.8, **SHORT_YARN),
            },
            "the best groups": {
                "topk_method": "group_limited_greedy",
                "n_group": 4,
                "topk_group": 2,
                "first_k_dense_replace": 0,
            },
            "biases": {"attention_bias": True, "mlp_bias": True, "first_k_dense_replace": 2},
        },
    ),
    "deepseek_v3": (
        {**DEEPSEEK_SIZES, "n_group": 4, "topk_group": 2},
        {
            "the best groups": rope("yarn", mscale=1.0, mscale_all_dim=1.0, **SHORT_YARN),
            "one group, halves": {"n_group": 1, "topk_group": 1, "rope_interleave": False},
            "scores as they are, biases": {
                "norm_topk_prob": False,
                "attention_bias": True,
                "n_shared_experts": 1,
            },
            "queries as they are": {
                "q_lora_rank": None,
                **rope("linear", factor=2.0, mscale_all_dim=0.5),
            },
        },
    ),
    "glm4_moe": (
        {**BALANCED_SIZES, "n_group": 4, "topk_group": 2},
        {
            "half of a head turns": {},
            "norms of each head, biases": {"use_qk_norm": True, "attention_bias": True},
            "an odd number of features turns": {"head_dim": 10},
            "one group, all layers with experts": {
                "n_group": 1,
                "topk_group": 1,
                "first_k_dense_replace": 0,
                "norm_topk_prob": False,
            },
        },
    ),
    "dots1": (
        BALANCED_SIZES,
        {
            "norms of each head": {},
            "windows in the last layers": {"sliding_window": 6, "max_window_layers": 1},
            "shares of their sum, biases": {"norm_topk_prob": True, "attention_bias": True},
        },
    ),
    "ernie4_5_moe": (
        {**LLAMA_SIZES, "moe_num_experts": 6, "moe_k": 3, "moe_intermediate_size": 20},
        {
            "shared experts": {},
            "none shared, own head": {
                "moe_num_shared_experts": 0,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": 1,
                **OWN_HEAD,
            },
            "experts in every second layer": {"moe_layer_interval": 2},
        },
    ),
}


def variants() -> Iterator[Variant]:
    """All of them."""
    for family, (base, changes) in VARIANTS.items():
        for name, change in changes.items():
            yield Variant(family, name, {**base, **change})

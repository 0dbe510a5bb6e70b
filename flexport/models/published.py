"""Sizes of published models, from the config.json of each repository.

A row is a model's name and the numbers that its config has in the order of the table's fields;
fields that all of a table's models share stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["configs"]


class _Table(NamedTuple):
    organisation: str
    shared: Mapping[str, Any]
    fields: Sequence[str]
    rows: Mapping[str, Sequence[Any]]


_DENSE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "intermediate_size",
)  # fmt: skip

_LLAMA = {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
_LLAMA_2 = {
    **_LLAMA, "vocab_size": 32000, "max_position_embeddings": 4096, "rope_theta": 1e4,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LLAMA_3 = {
    **_LLAMA, "vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 5e5,
    "tie_word_embeddings": False, "bos_token_id": 128000, "eos_token_id": 128001,
}  # fmt: skip


def _llama_31(factor: float) -> dict[str, Any]:
    """Llama 3 with a longer context."""
    return {
        **_LLAMA_3,
        "max_position_embeddings": 131072,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


_QWEN = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1e6,
    "use_sliding_window": False, "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip
_QWEN_25 = {**_QWEN, "model_type": "qwen2", "max_position_embeddings": 32768}
_QWEN_3 = {**_QWEN, "max_position_embeddings": 40960, "head_dim": 128, "attention_bias": False}

_MISTRAL = {
    "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 32768,
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

_GEMMA = {
    "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "attention_bias": False,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_GEMMA_2 = {
    **_GEMMA, "model_type": "gemma2", "vocab_size": 256000, "max_position_embeddings": 8192,
    "sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    "rope_theta": 1e4,
}  # fmt: skip
_GEMMA_3 = {
    **_GEMMA, "model_type": "gemma3_text", "sliding_window_pattern": 6, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}  # fmt: skip

_OPT = {
    "model_type": "opt", "do_layer_norm_before": True, "activation_function": "relu",
    "tie_word_embeddings": True, "max_position_embeddings": 2048, "vocab_size": 50272,
    "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1,
}  # fmt: skip
# arXiv:2205.01068 table 1; arXiv:2211.09085 table 5
_OPT_SIZES = {
    "125m": (768, 12, 12, 768, 3072),
    "350m": (1024, 24, 16, 512, 4096),
    "1.3b": (2048, 24, 32, 2048, 8192),
    "2.7b": (2560, 32, 32, 2560, 10240),
    "6.7b": (4096, 32, 32, 4096, 16384),
    "13b": (5120, 40, 40, 5120, 20480),
    "30b": (7168, 48, 56, 7168, 28672),
    "66b": (9216, 64, 72, 9216, 36864),
    "120b": (10240, 96, 80, 10240, 40960),
    "175b": (12288, 96, 96, 12288, 49152),
}
_OPT_FIELDS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "word_embed_proj_dim", "ffn_dim",
)  # fmt: skip


def _opt_rows(prefix: str, *sizes: str) -> dict[str, Sequence[Any]]:
    return {f"{prefix}-{size}": _OPT_SIZES[size] for size in sizes}


_GALACTICA = {**_OPT, "vocab_size": 50000, "bos_token_id": 0, "activation_function": "gelu"}
_BARE = {"enable_bias": False, "layer_norm_elementwise_affine": False}
"""The larger ones of Galactica were published without biases and norm weights."""

_TABLES = (
    _Table(
        "facebook", _OPT, _OPT_FIELDS,
        {
            **_opt_rows("opt", "125m", "1.3b", "2.7b", "6.7b", "13b", "30b", "66b", "175b"),
            **_opt_rows("opt-iml", "1.3b", "30b"),
            **_opt_rows("opt-iml-max", "1.3b", "30b"),
        },
    ),
    _Table(
        "facebook", {**_OPT, "do_layer_norm_before": False}, _OPT_FIELDS, _opt_rows("opt", "350m")
    ),
    _Table("facebook", _GALACTICA, _OPT_FIELDS, _opt_rows("galactica", "125m", "1.3b", "6.7b")),
    _Table(
        "facebook", {**_GALACTICA, **_BARE}, _OPT_FIELDS, _opt_rows("galactica", "30b", "120b")
    ),
    _Table(
        "TinyLlama",
        {**_LLAMA_2, "max_position_embeddings": 2048}, _DENSE,
        {"TinyLlama-1.1B-Chat-v1.0": (2048, 22, 32, 4, 5632)},
    ),
    _Table(
        "meta-llama", _LLAMA_2, _DENSE,
        {
            "Llama-2-7b-hf": (4096, 32, 32, 32, 11008),
            "Llama-2-13b-hf": (5120, 40, 40, 40, 13824),
            "Llama-2-70b-hf": (8192, 80, 64, 8, 28672),
        },
    ),
    _Table(
        "meta-llama", _LLAMA_3, _DENSE,
        {
            "Meta-Llama-3-8B": (4096, 32, 32, 8, 14336),
            "Meta-Llama-3-70B": (8192, 80, 64, 8, 28672),
        },
    ),
    _Table(
        "meta-llama", _llama_31(8.0), _DENSE,
        {
            "Llama-3.1-8B": (4096, 32, 32, 8, 14336),
            "Llama-3.1-70B": (8192, 80, 64, 8, 28672),
            "Llama-3.1-405B": (16384, 126, 128, 8, 53248),
            "Llama-3.3-70B-Instruct": (8192, 80, 64, 8, 28672),
        },
    ),
    _Table(
        "meta-llama",
        {**_llama_31(32.0), "tie_word_embeddings": True}, (*_DENSE, "head_dim"),
        {
            "Llama-3.2-1B": (2048, 16, 32, 8, 8192, 64),
            "Llama-3.2-3B": (3072, 28, 24, 8, 8192, 128),
        },
    ),
    _Table(
        "Qwen", _QWEN_25, (*_DENSE, "vocab_size", "tie_word_embeddings"),
        {
            "Qwen2.5-0.5B": (896, 24, 14, 2, 4864, 151936, True),
            "Qwen2.5-1.5B": (1536, 28, 12, 2, 8960, 151936, True),
            "Qwen2.5-3B": (2048, 36, 16, 2, 11008, 151936, True),
            "Qwen2.5-7B": (3584, 28, 28, 4, 18944, 152064, False),
            "Qwen2.5-14B": (5120, 48, 40, 8, 13824, 152064, False),
            "Qwen2.5-32B": (5120, 64, 40, 8, 27648, 152064, False),
            "Qwen2.5-72B": (8192, 80, 64, 8, 29568, 152064, False),
        },
    ),
    _Table(
        "Qwen", {**_QWEN_3, "model_type": "qwen3"}, (*_DENSE, "tie_word_embeddings"),
        {
            "Qwen3-0.6B": (1024, 28, 16, 8, 3072, True),
            "Qwen3-1.7B": (2048, 28, 16, 8, 6144, True),
            "Qwen3-4B": (2560, 36, 32, 8, 9728, True),
            "Qwen3-8B": (4096, 36, 32, 8, 12288, False),
            "Qwen3-14B": (5120, 40, 40, 8, 17408, False),
            "Qwen3-32B": (5120, 64, 64, 8, 25600, False),
        },
    ),
    _Table(
        "Qwen",
        {
            **_QWEN_3, "model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8,
            "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
            "tie_word_embeddings": False,
        },
        (*_DENSE, "moe_intermediate_size"),
        {
            "Qwen3-30B-A3B": (2048, 48, 32, 4, 6144, 768),
            "Qwen3-235B-A22B": (4096, 94, 64, 4, 12288, 1536),
        },
    ),
    _Table(
        "mistralai", {**_MISTRAL, "model_type": "mistral"},
        (*_DENSE, "vocab_size", "sliding_window", "rope_theta"),
        {
            "Mistral-7B-v0.1": (4096, 32, 32, 8, 14336, 32000, 4096, 1e4),
            "Mistral-7B-v0.3": (4096, 32, 32, 8, 14336, 32768, None, 1e6),
        },
    ),
    _Table(
        "mistralai",
        {
            **_MISTRAL, "model_type": "mixtral", "num_local_experts": 8,
            "num_experts_per_tok": 2, "vocab_size": 32000, "rope_theta": 1e6,
        },
        (*_DENSE, "max_position_embeddings"),
        {
            "Mixtral-8x7B-v0.1": (4096, 32, 32, 8, 14336, 32768),
            "Mixtral-8x22B-v0.1": (6144, 56, 48, 8, 16384, 65536),
        },
    ),
    _Table(
        "google", _GEMMA_2, (*_DENSE, "head_dim", "query_pre_attn_scalar"),
        {
            "gemma-2-2b": (2304, 26, 8, 4, 9216, 256, 256),
            "gemma-2-9b": (3584, 42, 16, 8, 14336, 256, 256),
            "gemma-2-27b": (4608, 46, 32, 16, 36864, 128, 144),
        },
    ),
    _Table(
        "google",
        {
            **_GEMMA_3, "vocab_size": 262144, "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
        (*_DENSE, "head_dim", "query_pre_attn_scalar"),
        {"gemma-3-1b-pt": (1152, 26, 4, 1, 6912, 256, 256)},
    ),
    _Table(  # their text parts
        "google",
        {
            **_GEMMA_3, "vocab_size": 262208, "max_position_embeddings": 131072,
            "sliding_window": 1024, "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        (*_DENSE, "head_dim", "query_pre_attn_scalar"),
        {
            "gemma-3-4b-pt": (2560, 34, 8, 4, 10240, 256, 256),
            "gemma-3-12b-pt": (3840, 48, 16, 8, 15360, 256, 256),
            "gemma-3-27b-pt": (5376, 62, 32, 16, 21504, 128, 168),
        },
    ),
    _Table(
        "openai",
        {
            "model_type": "gpt_oss", "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "vocab_size": 201088, "head_dim": 64, "attention_bias": True, "sliding_window": 128,
            "max_position_embeddings": 131072, "rope_theta": 150000, "swiglu_limit": 7.0,
            "num_experts_per_tok": 4, "tie_word_embeddings": False, "eos_token_id": 200002,
            "pad_token_id": 199999,
            "rope_scaling": {
                "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "original_max_position_embeddings": 4096, "truncate": False,
            },
        },
        (*_DENSE, "num_local_experts"),
        {
            "gpt-oss-20b": (2880, 24, 64, 8, 2880, 32),
            "gpt-oss-120b": (2880, 36, 64, 8, 2880, 128),
        },
    ),
    _Table(
        "deepseek-ai",
        {
            "model_type": "deepseek_v3", "hidden_act": "silu", "rms_norm_eps": 1e-6,
            "vocab_size": 129280, "max_position_embeddings": 163840, "rope_theta": 10000,
            "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_intermediate_size": 2048,
            "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
            "first_k_dense_replace": 3, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
            "rope_scaling": {
                "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
                "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096,
            },
        },
        _DENSE,
        {"DeepSeek-V3": (7168, 61, 128, 128, 18432)},
    ),
)  # fmt: skip


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model's name, its organisation first, and its config."""
    for table in _TABLES:
        for name, values in table.rows.items():
            own = dict(zip(table.fields, values, strict=True))
            yield f"{table.organisation}/{name}", {**table.shared, **own}

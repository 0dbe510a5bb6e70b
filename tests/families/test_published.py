"""Configs as they are published: the parameters that their authors count, all and of one token.

Each config is the part of the repository's config.json that decides sizes and arithmetic, with the
field names that it has there.
"""

from __future__ import annotations

from typing import Any

import pytest

from flexport.errors import UnsupportedModel
from flexport.models import ModelSpec, layer_tensors, num_parameters, spec_of
from flexport.models.spec import Experts

CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mixtral-8x7B-v0.1": {
        "model_type": "mixtral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-05,
        "sliding_window": None,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
    },
    "allenai/OLMoE-1B-7B-0924": {
        "model_type": "olmoe",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "clip_qkv": None,
        "attention_bias": False,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    },
    "openai/gpt-oss-20b": {
        "model_type": "gpt_oss",
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "experts_per_token": 4,
        "attention_bias": True,
        "hidden_act": "silu",
        "swiglu_limit": 7.0,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "rope_theta": 150000,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-05,
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
        "tie_word_embeddings": False,
    },
    "ibm-granite/granite-3.0-1b-a400m-base": {
        "model_type": "granitemoe",
        "vocab_size": 49152,
        "hidden_size": 1024,
        "intermediate_size": 512,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "num_experts_per_tok": 8,
        "attention_multiplier": 0.015625,
        "embedding_multiplier": 12.0,
        "logits_scaling": 6.0,
        "residual_multiplier": 0.22,
        "max_position_embeddings": 4096,
        "rope_scaling": None,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": True,
    },
    "deepseek-ai/DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "attention_bias": False,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-V2": {
        "model_type": "deepseek_v2",
        "vocab_size": 102400,
        "hidden_size": 5120,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 160,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
    },
    "deepseek-ai/DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "attention_bias": False,
        "max_position_embeddings": 163840,
        "rope_theta": 10000,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
    },
    "zai-org/GLM-4.5-Air": {
        "model_type": "glm4_moe",
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_nextn_predict_layers": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "use_qk_norm": False,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "max_position_embeddings": 131072,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    },
    "rednote-hilab/dots.llm1.base": {
        "model_type": "dots1",
        "vocab_size": 152064,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "n_routed_experts": 128,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "attention_bias": False,
        "max_window_layers": 62,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rope_scaling": None,
        "rope_theta": 10000000,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
    },
    "baidu/ERNIE-4.5-21B-A3B-PT": {
        "model_type": "ernie4_5_moe",
        "vocab_size": 103424,
        "hidden_size": 2560,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "moe_num_experts": 64,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 27,
        "moe_layer_interval": 1,
        "use_bias": False,
        "max_position_embeddings": 131072,
        "rope_theta": 500000,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
    },
}

PARAMETERS: dict[str, tuple[float, float]] = {
    # all, and those that one token passes: as their papers and model cards count them
    "mistralai/Mixtral-8x7B-v0.1": (46.7e9, 12.9e9),
    "Qwen/Qwen1.5-MoE-A2.7B": (14.3e9, 2.7e9),
    "Qwen/Qwen3-30B-A3B": (30.5e9, 3.3e9),
    "allenai/OLMoE-1B-7B-0924": (6.9e9, 1.3e9),
    "openai/gpt-oss-20b": (20.91e9, 3.61e9),
    "ibm-granite/granite-3.0-1b-a400m-base": (1.3e9, 0.4e9),
    "deepseek-ai/DeepSeek-V2-Lite": (15.7e9, 2.4e9),
    "deepseek-ai/DeepSeek-V2": (236e9, 21e9),
    "deepseek-ai/DeepSeek-V3": (671e9, 37e9),
    "zai-org/GLM-4.5-Air": (106e9, 12e9),
    "rednote-hilab/dots.llm1.base": (142e9, 14e9),
    "baidu/ERNIE-4.5-21B-A3B-PT": (21e9, 3e9),
}

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("Qwen/Qwen1.5-MoE-A2.7B", {"use_sliding_window": True}, "use_sliding_window"),
    ("openai/gpt-oss-20b", {"hidden_act": "gelu"}, "hidden_act"),
    ("deepseek-ai/DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob"),
    ("deepseek-ai/DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method"),
    ("deepseek-ai/DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}, "scoring_func"),
    ("deepseek-ai/DeepSeek-V2-Lite", {"num_key_value_heads": 4}, "num_key_value_heads"),
    ("deepseek-ai/DeepSeek-V3", {"topk_method": "greedy"}, "topk_method"),
    ("deepseek-ai/DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func"),
    ("deepseek-ai/DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek-ai/DeepSeek-V3", {"n_group": 7}, "7 groups"),
    ("deepseek-ai/DeepSeek-V3", {"topk_group": 9}, "9 best of 8"),
    ("deepseek-ai/DeepSeek-V3", {"n_group": 256}, "2 best of each"),
    ("mistralai/Mixtral-8x7B-v0.1", {"num_experts_per_tok": 9}, "9 experts"),
    ("mistralai/Mixtral-8x7B-v0.1", {"hidden_act": "mish"}, "hidden_act"),
    ("baidu/ERNIE-4.5-21B-A3B-PT", {"use_bias": True}, "use_bias"),
    ("baidu/ERNIE-4.5-21B-A3B-PT", {"moe_norm_min": 0.1}, "moe_norm_min"),
]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_parameters_are_those_that_the_authors_count(name):
    spec = spec_of(CONFIGS[name])
    total, passed = PARAMETERS[name]

    assert num_parameters(spec) == pytest.approx(total, rel=0.04)
    # Some count the tables of tokens among those that a token passes, and some do not.
    tables = (1 if spec.tied_head else 2) * spec.vocab_size * spec.hidden_size
    own = parameters_of_a_token(spec)
    assert 0.96 * (own - tables) <= passed <= 1.04 * own


def parameters_of_a_token(spec: ModelSpec) -> float:
    """All but those of the experts that it does not pass."""
    passed = float(num_parameters(spec))
    for index, layer in enumerate(spec.layers, start=1):
        if isinstance(layer.mlp, Experts):
            of_experts = sum(
                t.num_values for t in layer_tensors(spec, index) if t.expert is not None
            )
            passed -= of_experts * (1 - layer.mlp.top_k / layer.mlp.num_experts)
    return passed


@pytest.mark.parametrize(("name", "change", "named"), REFUSED)
def test_what_can_not_be_run_is_refused_by_name(name, change, named):
    with pytest.raises(UnsupportedModel, match=named):
        spec_of({**CONFIGS[name], **change})


def test_a_stretched_rope_sharpens_latent_attention():
    spec = spec_of(CONFIGS["deepseek-ai/DeepSeek-V3"])

    # 192 ** -0.5 * (0.1 * ln 40 + 1) ** 2
    assert spec.layers[0].attention.scale == pytest.approx(0.1352337788608801)


def test_layers_that_guess_more_tokens_are_left_out():
    assert "model.layers.61." in spec_of(CONFIGS["deepseek-ai/DeepSeek-V3"]).unused
    assert "model.layers.46." in spec_of(CONFIGS["zai-org/GLM-4.5-Air"]).unused
    assert "model.mtp_" in spec_of(CONFIGS["baidu/ERNIE-4.5-21B-A3B-PT"]).unused

"""Configs as their repositories have them: old names of fields, and more than anyone reads."""

from __future__ import annotations

from typing import Any

import pytest

from flexport.errors import UnsupportedModel
from flexport.models import num_parameters, spec_of
from flexport.models.spec import Attention

PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt2-xl": {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05,
        "n_ctx": 1024,
        "n_embd": 1600,
        "n_head": 25,
        "n_layer": 48,
        "n_positions": 1024,
        "output_past": True,
        "summary_type": "cls_index",
        "vocab_size": 50257,
    },
    "gpt-j-6b": {
        "model_type": "gptj",
        "activation_function": "gelu_new",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "layer_norm_epsilon": 1e-05,
        "n_embd": 4096,
        "n_head": 16,
        "n_inner": None,
        "n_layer": 28,
        "n_positions": 2048,
        "rotary": True,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "vocab_size": 50400,
    },
    "codegen-2b": {
        "model_type": "codegen",
        "activation_function": "gelu_new",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "n_ctx": 2048,
        "n_embd": 2560,
        "n_head": 32,
        "n_inner": None,
        "n_layer": 32,
        "n_positions": 2048,
        "rotary_dim": 64,
        "scale_attn_weights": True,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    },
    "gpt-neox-20b": {
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu_fast",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 64,
        "num_hidden_layers": 44,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 50432,
    },
    "pythia-70m": {
        "model_type": "gpt_neox",
        "bos_token_id": 0,
        "eos_token_id": 0,
        "hidden_act": "gelu",
        "hidden_size": 512,
        "intermediate_size": 2048,
        "max_position_embeddings": 2048,
        "num_attention_heads": 8,
        "num_hidden_layers": 6,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.25,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "vocab_size": 50304,
    },
    "bloom-560m": {
        "model_type": "bloom",
        "apply_residual_connection_post_layernorm": False,
        "attention_softmax_in_fp32": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "layer_norm_epsilon": 1e-05,
        "masked_softmax_fusion": True,
        "n_embed": 1024,
        "n_inner": None,
        "n_layer": 24,
        "num_attention_heads": 16,
        "offset_alibi": 100,
        "pad_token_id": 3,
        "pretraining_tp": 1,
        "seq_length": 2048,
        "vocab_size": 250880,
    },
    "falcon-7b": {
        "model_type": "falcon",
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_size": 4544,
        "layer_norm_epsilon": 1e-05,
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 71,
        "num_hidden_layers": 32,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "falcon-40b": {
        "model_type": "falcon",
        "alibi": False,
        "bias": False,
        "hidden_size": 8192,
        "layer_norm_epsilon": 1e-05,
        "new_decoder_architecture": True,
        "num_attention_heads": 128,
        "num_hidden_layers": 60,
        "num_kv_heads": 8,
        "parallel_attn": True,
        "vocab_size": 65024,
    },
    "falcon-rw-1b": {
        "model_type": "falcon",
        "alibi": True,
        "apply_residual_connection_post_layernorm": False,
        "bias": True,
        "hidden_size": 2048,
        "layer_norm_epsilon": 1e-05,
        "multi_query": False,
        "new_decoder_architecture": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 24,
        "parallel_attn": False,
        "vocab_size": 50304,
    },
    "mpt-7b-storywriter": {
        "model_type": "mpt",
        "attn_config": {
            "alibi": True,
            "alibi_bias_max": 16,
            "attn_impl": "torch",
            "attn_pdrop": 0,
            "attn_type": "multihead_attention",
            "attn_uses_sequence_id": False,
            "clip_qkv": 6,
            "prefix_lm": False,
            "qk_ln": False,
            "softmax_scale": None,
        },
        "d_model": 4096,
        "emb_pdrop": 0,
        "embedding_fraction": 1.0,
        "expansion_ratio": 4,
        "init_config": {"name": "kaiming_normal_"},
        "learned_pos_emb": True,
        "logit_scale": None,
        "max_seq_len": 65536,
        "n_heads": 32,
        "n_layers": 32,
        "no_bias": True,
        "norm_type": "low_precision_layernorm",
        "vocab_size": 50432,
    },
    "phi-2": {
        "model_type": "phi",
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "hidden_act": "gelu_new",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 2048,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": None,
        "partial_rotary_factor": 0.4,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 51200,
    },
    "stablelm-2-12b": {
        "model_type": "stablelm",
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": True,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_parallel_residual": True,
        "use_qkv_bias": False,
        "vocab_size": 100352,
    },
    "starcoder2-3b": {
        "model_type": "starcoder2",
        "activation_function": "gelu",
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "max_position_embeddings": 16384,
        "mlp_type": "default",
        "norm_epsilon": 1e-05,
        "norm_type": "layer_norm",
        "num_attention_heads": 24,
        "num_hidden_layers": 30,
        "num_key_value_heads": 2,
        "rope_theta": 999999.4420358813,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 4096,
        "use_bias": True,
        "vocab_size": 49152,
    },
}

# What transformers counts: sum(p.numel() for p in model.parameters()).
PARAMETERS = {
    "gpt2-xl": 1_557_611_200,
    "gpt-j-6b": 6_050_882_784,
    "codegen-2b": 2_779_356_160,
    "gpt-neox-20b": 20_554_567_680,
    "pythia-70m": 70_426_624,
    "bloom-560m": 559_214_592,
    "falcon-7b": 6_921_720_704,
    "falcon-40b": 41_303_293_952,
    "falcon-rw-1b": 1_311_625_216,
    "mpt-7b-storywriter": 6_649_286_656,
    "phi-2": 2_779_683_840,
    "stablelm-2-12b": 12_143_185_920,
    "starcoder2-3b": 3_030_371_328,
}

# What can't be run: a field of a model above, and the value that changes what is computed.
REFUSED = [
    ("gpt2-xl", "add_cross_attention", True),
    ("gpt2-xl", "activation_function", "mish"),
    ("gpt2-xl", "head_dim", 32),
    ("gpt2-xl", "n_embd", 0),
    ("gpt-j-6b", "rotary", False),
    ("gpt-j-6b", "rotary_dim", 63),
    ("gpt-j-6b", "rotary_dim", 258),
    ("gpt-j-6b", "scale_attn_weights", False),
    ("gpt-j-6b", "rope_scaling", {"type": "linear", "factor": 2.0}),
    ("codegen-2b", "n_head", 10),
    ("gpt-neox-20b", "num_attention_heads", 50),
    ("gpt-neox-20b", "num_key_value_heads", 8),
    ("bloom-560m", "apply_residual_connection_post_layernorm", True),
    ("bloom-560m", "n_inner", 1000),
    ("falcon-7b", "num_ln_in_parallel_attn", 2),
    ("falcon-40b", "num_ln_in_parallel_attn", 3),
    ("falcon-40b", "num_kv_heads", 9),
    ("falcon-40b", "parallel_attn", False),
    ("falcon-rw-1b", "num_kv_heads", 8),
    ("mpt-7b-storywriter", "expansion_ratio", 3),
    ("mpt-7b-storywriter", "logit_scale", "inv_sqrt_d_model"),
    ("mpt-7b-storywriter", "no_bias", False),
    ("mpt-7b-storywriter", "norm_type", "rmsnorm"),
    ("phi-2", "num_key_value_heads", 5),
    ("stablelm-2-12b", "num_key_value_heads", 7),
    ("starcoder2-3b", "mlp_type", "gated"),
    ("starcoder2-3b", "norm_type", "rms_norm"),
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_that_transformers_counts(name):
    assert num_parameters(spec_of(PUBLISHED[name])) == PARAMETERS[name]


@pytest.mark.parametrize(("name", "field", "value"), REFUSED)
def test_what_can_not_be_run_is_refused_by_name(name, field, value):
    with pytest.raises(UnsupportedModel, match=field):
        spec_of({**PUBLISHED[name], field: value})


def test_an_odd_feature_takes_the_next_one_along():
    rope = attention_of({**PUBLISHED["gpt-neox-20b"], "rotary_pct": 0.33}).rope  # 31 of 96

    assert rope is not None
    assert rope.num_features == 32
    assert rope.frequencies[1] == pytest.approx(1e4 ** (-2 / 31))


def test_an_unknown_scaling_of_rotary_positions_is_refused_by_its_type():
    with pytest.raises(UnsupportedModel, match="rope_type is 'cubic'"):
        spec_of({**PUBLISHED["gpt-neox-20b"], "rope_scaling": {"type": "cubic", "factor": 2.0}})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alibi", False),
        ("attn_type", "multiquery_attention"),
        ("attn_uses_sequence_id", True),
        ("prefix_lm", True),
        ("qk_ln", True),
        ("rope", True),
    ],
)
def test_what_mpt_can_not_run_of_attention_is_refused_by_name(field, value):
    config = PUBLISHED["mpt-7b-storywriter"]

    with pytest.raises(UnsupportedModel, match=field):
        spec_of({**config, "attn_config": {**config["attn_config"], field: value}})


def attention_of(config: dict[str, Any]) -> Attention:
    attention = spec_of(config).layers[0].attention
    assert isinstance(attention, Attention)
    return attention


def test_the_storywriter_falls_off_twice_as_fast_as_the_other_mpts():
    attention = attention_of(PUBLISHED["mpt-7b-storywriter"])

    assert attention.clip == 6.0
    assert attention.slopes is not None
    assert attention.slopes[:2] == (2**-0.5, 2**-1)
    assert attention.slopes[-1] == 2**-16


@pytest.mark.parametrize(
    ("name", "num_features", "frequency"),
    [
        ("gpt-j-6b", 64, 1e4 ** (-2 / 64)),
        ("codegen-2b", 64, 1e4 ** (-2 / 64)),
        ("gpt-neox-20b", 24, 1e4 ** (-2 / 24)),
        ("falcon-7b", 64, 1e4 ** (-2 / 64)),
        ("phi-2", 32, 1e4 ** (-2 / 32)),
        ("stablelm-2-12b", 40, 1e4 ** (-2 / 40)),
        ("starcoder2-3b", 128, 999999.4420358813 ** (-2 / 128)),
    ],
)
def test_old_fields_say_how_much_of_a_head_turns_and_how_fast(name, num_features, frequency):
    rope = attention_of(PUBLISHED[name]).rope

    assert rope is not None
    assert rope.num_features == num_features
    assert rope.frequencies[1] == pytest.approx(frequency, rel=1e-12)


@pytest.mark.parametrize(
    ("family", "num_features"), [("gpt_neox", 24), ("gptj", 64), ("phi", 32), ("stablelm", 20)]
)
def test_a_share_of_a_head_turns_where_the_config_does_not_say(family, num_features):
    rope = attention_of({"model_type": family}).rope

    assert rope is not None
    assert rope.num_features == num_features


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("gpt2-xl", {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}),
        ("gpt-j-6b", {"n_head": "num_attention_heads", "n_positions": "max_position_embeddings"}),
        ("bloom-560m", {"n_embed": "hidden_size", "n_layer": "num_hidden_layers"}),
        ("mpt-7b-storywriter", {"d_model": "hidden_size", "n_heads": "num_attention_heads"}),
        ("falcon-40b", {"num_kv_heads": "n_head_kv", "num_hidden_layers": "n_layer"}),
    ],
)
def test_fields_are_found_by_either_of_their_names(name, names):
    config = PUBLISHED[name]

    renamed = {names.get(field, field): value for field, value in config.items()}

    assert set(renamed) != set(config)
    assert spec_of(renamed) == spec_of(config)


def test_two_names_of_a_field_that_do_not_agree_are_refused():
    config = {**PUBLISHED["gpt2-xl"], "hidden_size": 1601}

    with pytest.raises(UnsupportedModel, match=r"hidden_size is 1601 and n_embd is 1600"):
        spec_of(config)


def test_a_window_is_that_of_the_config():
    assert attention_of(PUBLISHED["starcoder2-3b"]).window == 4096

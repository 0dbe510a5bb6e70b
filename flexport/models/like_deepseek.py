"""What DeepSeek's families and those made like them have in common, and how their configs say it.

The first layers have MLPs, the others experts, some of which every token passes: these lie in the
checkpoint as one MLP of their common width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexport.models.config import Config
from flexport.models.like_llama import read_mlp
from flexport.models.naming import EXPERT_PARTS, PREFIXES
from flexport.models.rope import read_rope, score_scale
from flexport.models.spec import Attention, Experts, LatentAttention, Layer, Norm

__all__ = [
    "latent_parts",
    "read_balanced_experts",
    "read_experts",
    "read_latent_attention",
    "read_layers",
    "unused_layers",
]

_LATENT_EPS = 1e-6
"""Of the norms of compressed vectors; no config has it."""


def read_latent_attention(fields: Config, *, interleaved: bool) -> LatentAttention:
    """Attention over one compressed vector a token (arXiv:2405.04434, section 2.1)."""
    num_heads = fields.count("num_attention_heads")
    fields.refuse_unless("num_key_value_heads", num_heads)
    plain_dim, rope_dim = fields.count("qk_nope_head_dim"), fields.count("qk_rope_head_dim")
    bias = fields.flag("attention_bias", False)
    rope = read_rope(
        fields,
        head_dim=rope_dim,
        max_positions=fields.count("max_position_embeddings"),
        interleaved=interleaved,
    )
    return LatentAttention(
        num_heads=num_heads,
        query_rank=fields.count_or_none("q_lora_rank"),
        latent_dim=fields.count("kv_lora_rank"),
        plain_dim=plain_dim,
        rope_dim=rope_dim,
        value_dim=fields.count("v_head_dim"),
        scale=(plain_dim + rope_dim) ** -0.5 * score_scale(fields),
        rope=rope,
        norm=Norm(kind="rms", eps=_LATENT_EPS),
        bias=bias,
        out_bias=bias,
    )


def latent_parts(attention: LatentAttention) -> Mapping[str, str]:
    """The names of a model's tensors."""
    is_compressed = attention.query_rank is not None
    return {
        **EXPERT_PARTS,
        "q_down": "layers.{i}.self_attn.q_a_proj",
        "q_norm": "layers.{i}.self_attn.q_a_layernorm",
        "q": f"layers.{{i}}.self_attn.{'q_b_proj' if is_compressed else 'q_proj'}",
        "kv_down": "layers.{i}.self_attn.kv_a_proj_with_mqa",
        "kv_norm": "layers.{i}.self_attn.kv_a_layernorm",
        "kv_up": "layers.{i}.self_attn.kv_b_proj",
    }


def read_experts(fields: Config) -> Experts:
    """Experts of which the best of all are picked, with shared ones."""
    dense, size = read_mlp(fields), fields.count("moe_intermediate_size")
    num_shared = fields.count_or_none("n_shared_experts")
    return Experts(
        num_experts=fields.count("n_routed_experts"),
        top_k=fields.count("num_experts_per_tok"),
        mlp=replace(dense, size=size, bias=False),
        normalised=fields.flag("norm_topk_prob", False),
        scale=fields.number("routed_scaling_factor", 1.0),
        shared=None if num_shared is None else replace(dense, size=num_shared * size),
    )


def read_balanced_experts(fields: Config) -> Experts:
    """Experts picked by sigmoids with corrections, which keep them equally busy.

    Source: arXiv:2412.19437, section 2.1.2.
    """
    return replace(
        read_experts(fields),
        scores="sigmoid",
        correction="vector",
        num_groups=fields.count("n_group", 1),
        top_groups=fields.count("topk_group", 1),
        group_best=2,
    )


def unused_layers(fields: Config) -> tuple[str, ...]:
    """How names begin in layers behind the last, which guess more than one token."""
    last = fields.count("num_hidden_layers")
    num_more = fields.count("num_nextn_predict_layers", 0, least=0)
    return tuple(
        f"{prefix}layers.{layer}." for prefix in PREFIXES for layer in range(last, last + num_more)
    )


def read_layers(
    fields: Config, attention: Attention | LatentAttention, experts: Experts
) -> list[Layer]:
    """All layers: MLPs in the first ones, experts in the others."""
    fields.refuse_unless("moe_layer_freq", 1)
    num_dense = fields.count("first_k_dense_replace", least=0)
    dense = read_mlp(fields)
    return [
        Layer(attention=attention, mlp=dense if layer < num_dense else experts)
        for layer in range(fields.count("num_hidden_layers"))
    ]

"""StableLM 3B, StableLM 2 and what came to be saved under their name (`model_type` "stablelm").

Llama's layers with plain layer norms, of which a share of each head turns. The 12b has a norm with
weights of its own for each head, and both halves of a layer take the same x through one norm.
Source: arXiv:2402.17834, and the config fields of transformers' StableLmConfig, whose defaults are
ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, LLAMA_PARTS, checkpoint_names
from flexport.models.rope import read_rope
from flexport.models.spec import Attention, HeadNorm, Layer, Mlp, ModelSpec, Norm

__all__ = ["spec"]

_PARTS = {
    **LLAMA_PARTS,
    "q_norm": "layers.{i}.self_attn.q_layernorm.norms.{h}",
    "k_norm": "layers.{i}.self_attn.k_layernorm.norms.{h}",
}


def spec(config: Mapping[str, Any]) -> ModelSpec:
    """The spec of a StableLM config; raises UnsupportedModel for what flexport does not know."""
    fields = Config("stablelm", config)
    hidden_size = fields.count("hidden_size", 2560)
    num_heads = fields.count("num_attention_heads", 32)
    head_dim = fields.head_dim(hidden_size, num_heads)
    max_positions = fields.count("max_position_embeddings", 4096)
    rope = read_rope(fields, head_dim=head_dim, max_positions=max_positions, share=0.25)
    eps = fields.number("layer_norm_eps", 1e-5)
    norms_heads = fields.flag("qk_layernorm", False)
    layer = Layer(
        attention=Attention(
            num_heads=num_heads,
            num_kv_heads=fields.kv_heads("num_key_value_heads", 32, num_heads),
            head_dim=head_dim,
            scale=head_dim**-0.5,
            bias=fields.flag("use_qkv_bias", False),
            rope=rope,
            head_norm=HeadNorm(norm=Norm(kind="layer", eps=eps), over="each", apart=True)
            if norms_heads
            else None,
        ),
        mlp=Mlp(
            size=fields.count("intermediate_size", 6912),
            activation=fields.choice("hidden_act", "silu", ACTIVATIONS),
            gated=True,
        ),
        parallel="one norm" if fields.flag("use_parallel_residual", False) else "no",
    )
    tied_head = fields.flag("tie_word_embeddings", False)
    return ModelSpec(
        family="stablelm",
        vocab_size=fields.count("vocab_size", 50304),
        hidden_size=hidden_size,
        layers=(layer,) * fields.count("num_hidden_layers", 32),
        norm=Norm(kind="layer", eps=eps, bias=True),
        max_positions=max(max_positions, rope.reach),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", 0),
        eos_token_ids=fields.token_ids("eos_token_id", 0),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(_PARTS, tied_head=tied_head),
    )

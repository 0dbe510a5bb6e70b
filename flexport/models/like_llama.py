"""What the families after Llama have in common, and how their configs say it.

Norms by the mean square before each half of a layer, heads that turn, a gated MLP. A family reads
these records, replaces what it does otherwise, and so says in a few lines what is special about it.
Its config's defaults are a table of its own: published configs may leave out what has its default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from flexport.models.config import Config
from flexport.models.naming import ACTIVATIONS, LLAMA_PARTS, PREFIXES, checkpoint_names
from flexport.models.rope import Rope, read_rope
from flexport.models.spec import Activation, Attention, Layer, Mlp, ModelSpec, Norm

__all__ = [
    "FULL",
    "SLIDING",
    "all_but_every",
    "build_model",
    "read_attention",
    "read_mlp",
    "read_norm",
    "read_turn",
    "read_windows",
]

FULL, SLIDING = "full_attention", "sliding_attention"
"""The types of layers, as configs call them."""


def read_attention(fields: Config, rope: Rope | None = None) -> Attention:
    """Grouped heads that turn, scaled by the root of their size; all projections biased or none.

    `rope` is for what `read_turn` without options does not say.
    """
    num_heads = fields.count("num_attention_heads")
    num_kv_heads = fields.kv_heads("num_key_value_heads", num_heads, num_heads)
    head_dim = _head_dim(fields)
    bias = fields.flag("attention_bias", False)
    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        bias=bias,
        out_bias=bias,
        rope=rope or read_turn(fields),
    )


def read_turn(
    fields: Config,
    *,
    interleaved: bool = False,
    layer_type: str | None = None,
    theta_name: str = "rope_theta",
) -> Rope:
    """How heads turn; `layer_type` says whose, where layers differ."""
    return read_rope(
        fields,
        head_dim=_head_dim(fields),
        max_positions=fields.count("max_position_embeddings"),
        layer_type=layer_type,
        theta_name=theta_name,
        interleaved=interleaved,
    )


def _head_dim(fields: Config) -> int:
    hidden_size, num_heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    return fields.count("head_dim", hidden_size // num_heads)


def read_mlp(
    fields: Config,
    activation: str = "hidden_act",
    known: Mapping[str, Activation] = ACTIVATIONS,
) -> Mlp:
    """A gated MLP; `activation` is the name of the field that says which."""
    return Mlp(
        size=fields.count("intermediate_size"),
        activation=fields.choice(activation, "silu", known),
        gated=True,
        bias=fields.flag("mlp_bias", False),
    )


def read_norm(fields: Config, *, wide: bool = False) -> Norm:
    """A norm by the mean square; `wide` is as in `Norm`."""
    return Norm(kind="rms", eps=fields.number("rms_norm_eps"), wide=wide)


def read_windows(
    fields: Config, window: int | None, slides: Callable[[int], bool]
) -> list[int | None]:
    """For each layer the window, or None if it sees the whole row.

    `slides` says which layers have the window where the config has no layer_types.
    """
    num_layers = fields.count("num_hidden_layers")
    types = fields.words("layer_types", num_layers, (FULL, SLIDING))
    if types is None:
        return [window if slides(layer) else None for layer in range(num_layers)]
    if window is None and SLIDING in types:
        raise fields.unsupported(f"layer_types has {SLIDING}, but there is no window", FULL)
    return [window if of_layer == SLIDING else None for of_layer in types]


def all_but_every(count: int) -> Callable[[int], bool]:
    """Layers but the last one of every `count`."""
    return lambda layer: (layer + 1) % count != 0


def build_model(
    fields: Config,
    layers: Sequence[Layer],
    norm: Norm,
    parts: Mapping[str, str] = LLAMA_PARTS,
    prefixes: Sequence[str] = PREFIXES,
    heads: Sequence[str] = ("lm_head",),
) -> ModelSpec:
    """The spec of these layers, with the rest of the config.

    `parts`, `prefixes` and `heads` are its names of tensors, as in `checkpoint_names`.
    """
    tied_head = fields.flag("tie_word_embeddings", False)
    ropes = [layer.attention.rope for layer in layers if layer.attention.rope is not None]
    return ModelSpec(
        family=fields.family,
        vocab_size=fields.count("vocab_size"),
        hidden_size=fields.count("hidden_size"),
        layers=tuple(layers),
        norm=norm,
        max_positions=max(
            [fields.count("max_position_embeddings"), *(rope.reach for rope in ropes)]
        ),
        tied_head=tied_head,
        bos_token_id=fields.token_id("bos_token_id", None),
        eos_token_ids=fields.token_ids("eos_token_id", None),
        pad_token_id=fields.token_id("pad_token_id", None),
        names=checkpoint_names(parts, prefixes, tied_head=tied_head, heads=heads),
    )

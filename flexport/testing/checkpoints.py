"""Tiny random checkpoints in the Hugging Face layout, for tests of flexport and of plug-ins.

transformers makes them, so that what flexport computes from them can be compared with what
transformers computes. The weights are larger than a fresh model's, so that greedy tokens vary
with the prompt and the place, and a wrong one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["VARIANTS", "byte_tokenizer", "tiny_opt"]

VARIANTS: dict[str, dict[str, Any]] = {
    "125m-like": {},
    "350m-like": {"do_layer_norm_before": False, "word_embed_proj_dim": 32, "init_std": 0.1},
    "galactica-like": {"activation_function": "gelu", "enable_bias": False},
    "no-affine-like": {
        "activation_function": "gelu",
        "enable_bias": False,
        "layer_norm_elementwise_affine": False,
    },
    "untied-like": {"tie_word_embeddings": False},
}
"""Settings of `tiny_opt` that make each shape of the OPT family once."""

_TINY: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "dropout": 0.0,
    "init_std": 0.2,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}


def tiny_opt(
    directory: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    shards: int = 1,
    variant: str = "125m-like",
    tokenizer: bool = False,
    **config_overrides: Any,
) -> Path:
    """Make a random OPT of about a hundred thousand weights in `directory`, and say where.

    `shards` is the least number of files that the weights are spread over. `config_overrides` are
    fields of transformers' OPTConfig. With `tokenizer`, a byte-level one is put beside the model.
    """
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(**{**_TINY, **VARIANTS[variant], **config_overrides})
    # A generator of our own would not reach transformers' initialisation.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = OPTForCausalLM(config)
        _roughen(model, config.init_std)
    model.to(getattr(torch, dtype))
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    model.save_pretrained(directory, max_shard_size=num_bytes // shards + 1)
    if tokenizer:
        byte_tokenizer(directory)
    return directory


def byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer of OPT's four special tokens and the 256 bytes to `directory`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # OPT starts every prompt with </s>.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def _roughen(model: Any, std: float) -> None:
    """Make a fresh model's weights tell more.

    Its biases are 0 and its norms 1, which would hide a mix-up. And its heads look at everything
    alike, so that the greedy text of a tied head is one token for ever; louder queries and keys
    make them look at something.
    """
    import torch

    for name, weight in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(weight, std=std / 2)
        elif "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=std)
        elif "q_proj" in name or "k_proj" in name:
            torch.nn.init.normal_(weight, std=4 * std)

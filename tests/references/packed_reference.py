"""What transformers computes with a cache whose groups are rounded, written without our codec.

Keys are rounded in groups of 64 tokens, feature by feature, values in groups of features, token by
token. Groups of tokens are counted from the prompt's end, backwards and forwards; the prompt's are
rounded after it was computed, a later one when its last token was.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

GROUP = 64


def rounded(groups: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """Groups, which are the last axis, as codes of so many bits can say them."""
    number = np.float16 if bits == 4 else np.float32

    def down(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        near = x.astype(number)
        return np.where(near > x, np.nextafter(near, number(-np.inf)), near).astype(np.float32)

    low = down(groups.min(-1, keepdims=True))
    scale = down((groups.max(-1, keepdims=True) - low) / np.float32(2**bits - 1))
    steps = np.divide(groups - low, scale, out=np.zeros_like(groups), where=scale > 0)
    codes: np.ndarray[Any, Any] = np.clip(np.rint(steps), 0, 2**bits - 1).astype(np.float32)
    return np.asarray(codes * scale + low)


def rounded_keys(keys_KLE: Tensor, bits: int) -> Tensor:
    """Keys of tokens that end with a group, rounded along the tokens."""
    out, last = keys_KLE.clone(), keys_KLE.shape[1]
    while last > 0:
        tokens = slice(max(0, last - GROUP), last)
        out[:, tokens] = torch.from_numpy(rounded(keys_KLE[:, tokens].mT.numpy(), bits)).mT
        last -= GROUP
    return out


def rounded_values(values_KLE: Tensor, bits: int) -> Tensor:
    """Values, rounded along the features."""
    size = values_KLE.shape[-1]
    groups = values_KLE.unflatten(-1, (-1, GROUP if size % GROUP == 0 else size))
    return torch.from_numpy(rounded(groups.numpy(), bits)).flatten(-2)


class RoundedLayer(DynamicLayer):  # type: ignore[misc]  # transformers has no types
    """One layer of such a cache, of one row."""

    bits = 0
    exact_from = 0
    """The first token that was not rounded yet."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All keys and values; those that are new are exact."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.keys, self.values = keys.clone(), values.clone()
        length, at = keys.shape[2], self.exact_from
        if at == 0 or length - at == GROUP:
            self.keys[0, :, at:] = rounded_keys(keys[0, :, at:], self.bits)
            self.values[0, :, at:] = rounded_values(values[0, :, at:], self.bits)
            self.exact_from = length
        return keys, values


@torch.no_grad()
def logits_of(model: Any, prompt: Sequence[int], ids: Sequence[int], bits: int) -> Tensor:
    """Logits before each of the tokens that go on with a prompt, with a cache of so many bits.

    With 0 bits nothing is rounded.
    """
    layer = type("Layer", (RoundedLayer,), {"bits": bits}) if bits else DynamicLayer
    cache = Cache(layer_class_to_replicate=layer)
    given: list[Sequence[int]] = [prompt, *([token] for token in ids[:-1])]
    return torch.stack(
        [
            model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits[0, -1]
            for tokens in given
        ]
    ).float()

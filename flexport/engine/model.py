"""`flexport.Model`: the engine as Python users know it from Hugging Face's `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from flexport.engine.llm import LLM
from flexport.errors import UsageError
from flexport.records import SamplingParams

__all__ = ["Model"]


class Model:
    """A model that runs as it fits, with tensors in and out; a context manager."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    @classmethod
    def from_pretrained(cls, model: str | Path, **options: Any) -> Model:
        """The model of a directory or hub id; the options are those of `flexport.LLM`."""
        return cls(LLM(model, **options))

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        max_new_tokens: int = 32,
        min_new_tokens: int = 0,
        stop: int | str | Sequence[int] | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continue rows of token ids: (B, L) -> (B, L + new), int64.

        `attention_mask` is 0 where a row is padded, on either side; without it nothing is
        padding. `stop` is a token id, a text, or several of one kind, beside the model's own end
        of text. Rows that end early are filled up with the padding token. Without do_sample the
        most likely token is taken, and the sampling options are not looked at.
        """
        if input_ids.dim() != 2:
            raise UsageError(f"input_ids must have shape (B, L), got {tuple(input_ids.shape)}")
        mask_BL = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask_BL.shape != input_ids.shape:
            raise UsageError(
                f"attention_mask has shape {tuple(mask_BL.shape)}, input_ids "
                f"{tuple(input_ids.shape)}"
            )
        texts, ids = _stops(stop)
        params = SamplingParams(
            max_tokens=max_new_tokens,
            min_tokens=min_new_tokens,
            temperature=temperature if do_sample else 0.0,
            top_k=top_k if do_sample else 0,
            top_p=top_p if do_sample else 1.0,
            min_p=min_p if do_sample else 0.0,
            repetition_penalty=repetition_penalty,
            stop=texts,
            stop_token_ids=ids,
            seed=seed,
        )
        prompts = [
            row_L[keep_L.bool()].tolist() for row_L, keep_L in zip(input_ids, mask_BL, strict=True)
        ]
        outputs = self.llm.generate(prompts, params)
        new_ids = [output.outputs[0].token_ids for output in outputs]
        width = max(map(len, new_ids), default=0)
        new_BN = torch.full((len(new_ids), width), self._pad_id, dtype=input_ids.dtype)
        for new_N, row in zip(new_BN, new_ids, strict=True):
            new_N[: len(row)] = torch.tensor(row, dtype=input_ids.dtype)
        return torch.cat([input_ids, new_BN.to(input_ids.device)], dim=1)

    def close(self) -> None:
        """Give everything back."""
        self.llm.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _pad_id(self) -> int:
        spec = self.llm.engine.spec
        ends = spec.eos_token_ids
        return spec.pad_token_id if spec.pad_token_id is not None else ends[0] if ends else 0


def _stops(
    stop: int | str | Sequence[int] | Sequence[str] | None,
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Stop texts and stop token ids."""
    if stop is None:
        return (), ()
    listed = [stop] if isinstance(stop, int | str) else list(stop)
    texts = tuple(item for item in listed if isinstance(item, str))
    ids = tuple(item for item in listed if isinstance(item, int))
    return texts, ids

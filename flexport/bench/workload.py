"""The work that is measured: prompts of random tokens, all of one length, none ended early.

Every contestant makes the same prompts from the same numbers. No torch here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["FIRST_ORDINARY_TOKEN", "Workload"]

FIRST_ORDINARY_TOKEN = 4
"""Below it are the special tokens of OPT and most others: beginning, padding, end, unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """How many prompts, how long, and how many tokens each is continued by."""

    num_prompts: int
    prompt_len: int
    gen_len: int
    seed: int = 0

    @property
    def num_new_tokens(self) -> int:
        """Tokens that all rows together generate."""
        return self.num_prompts * self.gen_len

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids of each prompt; the first prompts do not depend on how many there are."""
        first = min(FIRST_ORDINARY_TOKEN, vocab_size - 1)
        source = random.Random(self.seed)
        return [
            [source.randrange(first, vocab_size) for _ in range(self.prompt_len)]
            for _ in range(self.num_prompts)
        ]

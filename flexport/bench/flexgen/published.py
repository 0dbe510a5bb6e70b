"""What FlexGen's authors measured on one T4: each run, as far as it was published.

Sources: the paper, arXiv:2303.06865 (its table 2 and its ablation), and comments in the authors'
benchmark suite (repository FMInference/FlexLLMGen, bench_suite.py).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GEN_LEN", "PUBLISHED", "Setting"]

GEN_LEN = 32
"""New tokens of each row, in all of the paper's tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run of FlexGen's, as far as it was published."""

    model: str
    prompt_len: int
    batch_size: int
    num_batches: int
    percent: tuple[int, int, int, int, int, int]
    tok_s: float
    """Published."""
    source: str = ""
    cpu: bool = True
    """The CPU attends, in decode steps, to a cache that is not on the device."""
    packs_weights: bool = False
    packs_cache: bool = False
    overlaps: bool = True
    pinned: bool = True
    """Weights on the host are in pinned memory."""

    @property
    def num_rows(self) -> int:
        """Of the block."""
        return self.batch_size * self.num_batches


Percent = tuple[int, int, int, int, int, int]
ON_DEVICE: Percent = (100, 0, 100, 0, 100, 0)
ON_HOST: Percent = (0, 100, 0, 100, 0, 100)
OF_30B: Percent = (20, 80, 0, 100, 0, 100)
OF_175B: Percent = (0, 50, 0, 0, 0, 100)


def _setting(
    model: str,
    prompt_len: int,
    shape: tuple[int, int],
    percent: Percent,
    tok_s: float,
    source: str,
    **options: bool,
) -> Setting:
    return Setting(
        model=f"facebook/opt-{model}",
        prompt_len=prompt_len,
        batch_size=shape[0],
        num_batches=shape[1],
        percent=percent,
        tok_s=tok_s,
        source=source,
        **{"pinned": model != "175b", **options},
    )


_PACKED = {"packs_weights": True, "packs_cache": True, "cpu": False, "pinned": True}

PUBLISHED = (
    _setting("6.7b", 512, (2, 1), ON_DEVICE, 25.26, "table 2"),
    _setting("30b", 512, (48, 3), OF_30B, 7.32, "table 2"),
    _setting("175b", 512, (32, 8), OF_175B, 0.69, "table 2"),
    _setting("6.7b", 1024, (1, 1), ON_DEVICE, 13.72, "table 2"),
    _setting("30b", 1024, (20, 4), (4, 96, 0, 100, 0, 100), 3.50, "table 2"),
    _setting("175b", 1024, (12, 12), OF_175B, 0.35, "table 2"),
    _setting("6.7b", 256, (4, 1), ON_DEVICE, 53.29, "suite"),
    _setting("30b", 256, (160, 2), (10, 90, 0, 100, 0, 100), 16.01, "suite"),
    _setting("175b", 256, (64, 8), OF_175B, 1.36, "suite"),
    _setting("175b", 512, (32, 2), OF_175B, 0.419, "figure 1"),
    _setting("175b", 512, (32, 4), OF_175B, 0.571, "figure 1"),
    _setting("30b", 512, (48, 3), OF_30B, 5.86, "no overlap", overlaps=False),
    _setting("175b", 512, (32, 8), OF_175B, 0.59, "no overlap", overlaps=False),
    _setting("30b", 512, (48, 3), OF_30B, 4.03, "no CPU", cpu=False),
    _setting("175b", 512, (32, 8), OF_175B, 0.62, "no CPU", cpu=False),
    _setting("30b", 512, (48, 3), ON_HOST, 7.26, "no search"),
    _setting("175b", 512, (32, 1), OF_175B, 0.27, "no search"),
    _setting("175b", 512, (48, 3), ON_HOST, 1.12, "4 bits", **_PACKED),
    _setting("175b", 1024, (12, 4), ON_HOST, 0.42, "4 bits", **_PACKED),
    _setting("175b", 256, (96, 3), ON_HOST, 2.26, "4 bits", **_PACKED),
)
"""One T4, 32 new tokens. "suite" is what comments in the authors' benchmark suite say; "figure 1" was
read off, and its shapes are guessed from the blocks; the ablation's rows are as
summaries of the paper quote them, and "no search" is from memory, not checked."""

"""Checkpoints as they are: Hugging Face directories, read in place and checked before use.

It says where each tensor's bytes lie; reading them is the store's business.
"""

from __future__ import annotations

from flexport.checkpoint.directory import Checkpoint, Wanted, open_checkpoint, require, unexpected
from flexport.checkpoint.header import read_header

__all__ = ["Checkpoint", "Wanted", "open_checkpoint", "read_header", "require", "unexpected"]

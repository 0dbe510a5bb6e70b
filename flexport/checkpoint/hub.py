"""Checkpoints from the Hugging Face hub: fetched once, then found in its cache.

huggingface_hub does the work and obeys its own environment: HF_HOME, HF_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN and HF_HUB_OFFLINE. Only what is needed is fetched: never pickled weights, and no shard
that the index does not name.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from flexport.errors import CheckpointError

__all__ = ["fetch"]

_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "tokenizer*"]
"""Configs, chat templates, vocabularies. Index files end in .json too."""


def fetch(model: str, revision: str | None, shards_of: Callable[[Path], Sequence[str]]) -> Path:
    """The directory of a hub id in the local cache, fetched if it is not there yet.

    `shards_of` gives the files that an index file names. Raises CheckpointError.
    """
    if not _ID.fullmatch(model):
        raise CheckpointError(
            f"there is no directory {model}, and it is no hub id (such as facebook/opt-1.3b)"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        directory = Path(
            snapshot_download(
                model, revision=revision, allow_patterns=_SMALL_FILES, ignore_patterns=["*/*"]
            )
        )
        index = directory / "model.safetensors.index.json"
        files = shards_of(index) if index.exists() else ["model.safetensors"]
        # The commit and not the branch, which may have moved meanwhile.
        snapshot_download(
            model,
            revision=directory.name,
            allow_patterns=[glob.escape(file) for file in files],
        )
    except (OSError, HFValidationError) as error:
        raise CheckpointError(_explain(model, revision, error)) from error
    return directory


def _explain(model: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return (
            f"{model} is gated on the hub: ask for access on its page, then set HF_TOKEN or run "
            "`hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision!r} on the hub"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no directory {model} and no such model on the hub; if it is a private one, "
            "set HF_TOKEN or run `hf auth login`"
        )
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return (
            f"there is no directory {model}, it is not in the hub's local cache, and the hub can't "
            "be reached (or HF_HUB_OFFLINE is set); fetch it where there is a network with "
            f"`hf download {model}` and copy the directory, or point HF_HOME at a cache that has it"
        )
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"can't fetch {model} from the hub: {first_line}"

"""Every error that flexport raises on purpose, in one tree.

    FlexportError
    ├── UsageError               exit code 2: what was asked can't work
    │   ├── PolicyError          shares, block shape or options that contradict each other
    │   ├── DoesNotFit           the budgets are too small; says the smallest that would do
    │   ├── BackendUnavailable   no such backend, or it can't be used on this machine
    │   ├── CheckpointError      missing, truncated, lying or pickled checkpoint files
    │   └── UnsupportedModel     a family, or a feature of its config, that flexport does not know
    ├── RowError                 one row of the input can't be run; the others go on
    └── RunError                 exit code 1: a run broke off; finished rows are kept
        ├── StorageError         a disk read or write failed
        │   └── DiskFull         no space left, or the disk budget is used up
        └── OutOfMemory          an allocation failed on the device

A message says what was asked, what was found, and what would work.
"""

from __future__ import annotations

__all__ = [
    "BackendUnavailable",
    "CheckpointError",
    "DiskFull",
    "DoesNotFit",
    "FlexportError",
    "OutOfMemory",
    "PolicyError",
    "RowError",
    "RunError",
    "StorageError",
    "UnsupportedModel",
    "UsageError",
]


class FlexportError(Exception):
    """The root: catch this to catch everything flexport raises on purpose."""


class UsageError(FlexportError):
    """What was asked can't work as asked; nothing was started."""


class PolicyError(UsageError):
    """Shares, block shape or options contradict each other."""


class DoesNotFit(UsageError):
    """The memory or disk budgets are too small for the job."""


class BackendUnavailable(UsageError):
    """No backend of that name is installed, or it can't be used here."""


class CheckpointError(UsageError):
    """The checkpoint's files are missing, damaged, inconsistent or unsafe to read."""


class UnsupportedModel(UsageError):
    """The model's family, or a feature its config asks for, is not known."""


class RowError(FlexportError):
    """One row of the input can't be run.

    `code` is a short machine-readable word, e.g. "prompt_too_long".
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class RunError(FlexportError):
    """A run that had started broke off; rows that were finished are kept."""


class StorageError(RunError):
    """Reading or writing a file failed in mid-run."""


class DiskFull(StorageError):
    """The file system has no space left, or the disk budget is used up."""


class OutOfMemory(RunError):
    """The device had no room for an allocation."""

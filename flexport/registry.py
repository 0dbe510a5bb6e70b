"""Which backends are installed, which of them can be used here, and opening one.

Plug-ins are found by the entry-point group `flexport.backends`. Each is loaded by itself:
whatever goes wrong in one (an import error, a wrong type, another version of the contract, a
raising probe) becomes its reason in the list and never stops the others. Listing imports no
torch; only `open_backend` may.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from flexport.backend import API, Backend, BackendPlugin, Capabilities
from flexport.errors import BackendUnavailable

__all__ = [
    "CPU",
    "ENVIRONMENT_VARIABLE",
    "GROUP",
    "Listing",
    "auto_order",
    "backends",
    "describe_backend",
    "open_backend",
    "which_backend",
]

GROUP = "flexport.backends"
"""The entry-point group that plug-ins register in."""

ENVIRONMENT_VARIABLE = "FLEXPORT_BACKEND"
"""Names the backend that "auto" stands for, where it is set and not empty."""

CPU = "cpu"
"""The backend that computes in host memory, on every machine; it may work beside another one."""

_MEMBERS = ("capabilities", "allocate", "copy_async", "matmul", "attention", "sync", "close")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """One registered backend and whether it can be used on this machine."""

    name: str
    distribution: str
    """The installed distribution that registers it, "unknown" if its metadata doesn't say."""
    version: str
    """That distribution's version, "" if unknown."""
    plugin: BackendPlugin | None
    """None if it could not even be loaded."""
    reason_not_usable: str | None
    """None if it is usable, else why not, in words for people."""

    @property
    def usable(self) -> bool:
        """Whether `open_backend` may be tried with this name."""
        return self.reason_not_usable is None


def backends() -> list[Listing]:
    """Every registered backend, sorted by name, each with the reason why it can't be used."""
    return _list(entry_points(group=GROUP))


def auto_order(listings: Iterable[Listing]) -> list[Listing]:
    """The listings that "auto" tries, in order: usable ones, highest rank first."""
    usable = [
        (-listing.plugin.rank, listing.name, listing)
        for listing in listings
        if listing.usable and listing.plugin is not None
    ]
    return [listing for _, _, listing in sorted(usable, key=lambda entry: entry[:2])]


def open_backend(name: str = "auto") -> tuple[str, Backend]:
    """Open the backend called `name`; "auto" is the usable one of the highest rank that opens.

    "NAME:1" is the second device of the backend NAME. Returns its name and the open backend,
    which the caller closes. For "auto", the environment variable FLEXPORT_BACKEND, if set, says
    the name instead. Raises BackendUnavailable with the reason of every backend that was
    considered.
    """
    listings = backends()
    name, asked = _asked(name)
    if name != "auto":
        listing, index = _named(name, asked, listings)
        return name, _open(listing, asked, listings, index)

    failures: dict[str, str] = {}
    for listing in auto_order(listings):
        try:
            return listing.name, _open(listing, f"backend {listing.name!r}", listings)
        except BackendUnavailable as error:
            failures[listing.name] = str(error)
            _log.warning("%s; trying the next backend", error)
    raise BackendUnavailable(f"no backend can be used here: {_reasons(listings, failures)}")


def which_backend(name: str = "auto") -> str:
    """The name of the backend that `open_backend` would try first.

    Raises BackendUnavailable if "auto" has none to try.
    """
    name, _ = _asked(name)
    if name != "auto":
        return name
    listings = backends()
    order = auto_order(listings)
    if not order:
        raise BackendUnavailable(f"no backend can be used here: {_reasons(listings, {})}")
    return order[0].name


def describe_backend(name: str = "auto") -> Capabilities | None:
    """What the backend that `open_backend` would open says of itself, without torch.

    None if it can't say, or can't be used: opening it tells why. Raises BackendUnavailable for a
    name that is not installed.
    """
    name, asked = _asked(name)
    listings = backends()
    listing: Listing | None
    if name == "auto":
        listing, index = next(iter(auto_order(listings)), None), None
    else:
        listing, index = _named(name, asked, listings)
    if listing is None or listing.plugin is None or not listing.usable:
        return None
    plugin = listing.plugin
    try:
        if index is not None:
            return None if plugin.describe_index is None else plugin.describe_index(index)
        return None if plugin.describe is None else plugin.describe()
    except Exception as error:  # noqa: BLE001 - a stranger's code; opening it is what counts
        _log.warning("%s could not describe itself: %s", listing.name, _text(error))
        return None


def _asked(name: str) -> tuple[str, str]:
    """The backend's name, the environment's in place of "auto", and what to call it in errors."""
    if name == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "").strip() or "auto"
        if name != "auto":
            return name, f"backend {name!r} (from {ENVIRONMENT_VARIABLE})"
    return name, f"backend {name!r}"


def _list(found: Iterable[EntryPoint]) -> list[Listing]:
    """Listings of entry points; of several with one name, the first on the path counts."""
    listings: list[Listing] = []
    first_of: dict[str, tuple[str, str]] = {}
    for entry in found:
        distribution, version = _origin(entry)
        taken = first_of.setdefault(entry.name, (entry.value, distribution))
        if taken == (entry.value, distribution):
            plugin, reason = _load(entry)
        else:
            plugin = None
            reason = (
                f"the name {entry.name!r} is already taken by {taken[0]} from {taken[1]}; "
                "uninstall one of the two"
            )
        listings.append(
            Listing(
                name=entry.name,
                distribution=distribution,
                version=version,
                plugin=plugin,
                reason_not_usable=reason,
            )
        )
    return sorted(listings, key=lambda listing: listing.name)


def _origin(entry: EntryPoint) -> tuple[str, str]:
    """Distribution and version that an entry point comes from."""
    if entry.dist is None:
        return "unknown", ""
    return str(entry.dist.metadata["Name"] or "unknown"), str(entry.dist.version or "")


def _load(entry: EntryPoint) -> tuple[BackendPlugin | None, str | None]:
    """The plug-in that an entry point names, and why it can't be used here (None if it can)."""
    # A plug-in is a stranger's code, and whatever it raises, SystemExit included, must not end the
    # listing of the others.
    try:
        plugin = entry.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return None, f"loading {entry.value} failed: {_text(error)}"
    if not isinstance(plugin, BackendPlugin):
        return None, f"{entry.value} is a {type(plugin).__name__}, not a BackendPlugin"
    if plugin.api != API:
        return plugin, (
            f"it is written for version {plugin.api} of the backend contract and this flexport "
            f"has version {API}; install versions that match"
        )
    try:
        reason = plugin.probe()
    except (Exception, SystemExit) as error:  # noqa: BLE001
        return plugin, f"its probe failed: {_text(error)}"
    if reason is not None and not isinstance(reason, str):
        return plugin, f"its probe answered {reason!r}, not None or a reason"
    return plugin, reason


def _named(name: str, asked: str, listings: Sequence[Listing]) -> tuple[Listing, int | None]:
    """The listing that "NAME" or "NAME:INDEX" means, and the index; of duplicates the loaded one."""
    name, colon, number = name.partition(":")
    same = [listing for listing in listings if listing.name == name]
    if not same:
        names = ", ".join(sorted({listing.name for listing in listings})) or "none"
        raise BackendUnavailable(f"{asked} is not installed; installed: {names}")
    if colon and not (number.isascii() and number.isdigit()):
        raise BackendUnavailable(
            f"{asked} has {number!r} where the number of a device belongs; write e.g. {name}:0"
        )
    listing = next((listing for listing in same if listing.plugin is not None), same[0])
    return listing, int(number) if colon else None


def _open(
    listing: Listing, asked: str, listings: Sequence[Listing], index: int | None = None
) -> Backend:
    """Open one listing, or raise BackendUnavailable saying why not and what would work."""
    if listing.plugin is None or listing.reason_not_usable is not None:
        usable = ", ".join(other.name for other in auto_order(listings)) or "none"
        raise BackendUnavailable(
            f"{asked} can't be used here: {listing.reason_not_usable}; usable: {usable}"
        )
    plugin = listing.plugin
    if index is not None and plugin.open_index is None:
        raise BackendUnavailable(
            f"{asked} asks for device {index}, and this backend has only one; "
            f"write {listing.name} without a number"
        )
    try:
        if index is not None and plugin.open_index is not None:
            backend = plugin.open_index(index)
        else:
            backend = plugin.open()
    except Exception as error:
        raise BackendUnavailable(f"{asked} did not open: {_text(error)}") from error
    missing = [member for member in _MEMBERS if not hasattr(backend, member)]
    if missing:
        raise BackendUnavailable(
            f"{asked} opened as a {type(backend).__name__} that lacks {', '.join(missing)}"
        )
    return backend


def _reasons(listings: Sequence[Listing], failures: dict[str, str]) -> str:
    """One clause for each backend: why it was not taken."""
    if not listings:
        return "none is registered; reinstall flexport"
    return "; ".join(
        f"{listing.name}: {listing.reason_not_usable or failures.get(listing.name, 'not tried')}"
        for listing in listings
    )


def _text(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".rstrip(": ")

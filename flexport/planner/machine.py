"""What a machine can do, in numbers: memory, lanes, kernels, fixed costs.

A machine is a record that `flexport profile` measures, or that was put together from a datasheet
or a paper; either way it says of each number where it comes from. Nothing here runs anything, so
a plan can be made for a machine that is not at hand.

Its file is JSON. Names end in their unit (`_bytes`, `_s`, `_per_s`); rates are in bytes,
multiplications and additions, or values a second.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from flexport.errors import UsageError

__all__ = ["Computer", "Curve", "Lane", "Machine", "machine_from_dict", "read_machine"]

FORMAT = 2
"""Of machine files: raised when a field changes its meaning, so that old ones are measured anew."""

Record = TypeVar("Record")

SOURCES = ("measured", "datasheet", "paper", "estimated")
"""Where a number may come from: this machine, its maker, a publication, or a guess of ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """A way for bytes: n of them take copy_s + n / bytes_per_s."""

    bytes_per_s: float
    copy_s: float = 0.0
    """Fixed cost of one copy."""

    def seconds(self, num_bytes: float, num_copies: float = 1.0) -> float:
        """How long so many bytes take, in so many copies one after the other."""
        return num_copies * self.copy_s + num_bytes / self.bytes_per_s if num_bytes else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """The rate of products x @ weight.T against the rows of x.

    Between two rows that were measured the time is on the straight line between their times, and
    beyond the last one the rate stays. Below the first the time does: the weight is read anyway.
    """

    rows: tuple[float, ...]
    flops_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if (
            not self.rows
            or len(self.rows) != len(self.flops_per_s)
            or min(self.rows) <= 0
            or min(self.flops_per_s) <= 0
            or list(self.rows) != sorted(set(self.rows))
        ):
            raise UsageError(
                f"a curve is rising rows and a rate > 0 for each, not rows {list(self.rows)} and "
                f"flops_per_s {list(self.flops_per_s)}"
            )

    def seconds(self, rows: float, values: float) -> float:
        """How long a product of so many rows with a weight of so many values takes."""
        return self._of_value(rows) * values if rows > 0 else 0.0

    def _of_value(self, rows: float) -> float:
        times_s = [2 * at / rate for at, rate in zip(self.rows, self.flops_per_s, strict=True)]
        after = bisect_left(self.rows, rows)
        if after == 0:
            return times_s[0]
        if after == len(self.rows):
            return 2 * rows / self.flops_per_s[-1]
        low, high = self.rows[after - 1], self.rows[after]
        share = (rows - low) / (high - low)
        return times_s[after - 1] + share * (times_s[after] - times_s[after - 1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Computer:
    """What computes: the device, or the CPU beside it.

    A form is a dtype that weights are multiplied in ("bfloat16"), or a codec that they are
    multiplied in as they are ("int8"). What is missing from a map has not been measured, and is
    what its docstring says.
    """

    products: Mapping[str, Curve]
    """By form, with weights that stay, laid out as the kernel likes them."""
    streamed_products: Mapping[str, Curve] = field(default_factory=dict)
    """By form, with weights that have just come, as they lie in a file. Missing: as `products`."""
    direct_rows: Mapping[str, int] = field(default_factory=dict)
    """By codec, the most tokens of a sweep up to which weights are multiplied in it; with more they
    are decoded first. Missing: always decoded."""
    decoded_values_per_s: Mapping[str, float] = field(default_factory=dict)
    """By codec, what weights are decoded at. Missing: at memory's rate, 4 bytes a value."""
    memory_bytes_per_s: float
    """What one reader of a large tensor sees."""
    touched_values_per_s: float
    """What norms, rotations, activations and sums of prompts pass through, in values of one token's
    states: those that `models.tensors.touched_values` counts."""
    stepped_values_per_s: float | None = None
    """The same of decode steps, whose keys and values each go to a row's own page, and whose
    attention has a cost for each row beside its cache's bytes. None: as `touched_values_per_s`."""
    prompt_attention_flops_per_s: float
    """Of prompts over themselves: 4 operations a feature, query and key that the query sees."""
    cache_bytes_per_s: Mapping[int, float]
    """By queries a key/value head, what decode steps read keys and values at. Missing: the next
    smaller number's rate times as many fewer, for the keys are read once for each query."""
    unpacked_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """By codec, what a packed cache is unpacked at, in bytes of what becomes of it. Missing: as
    decode steps read it."""
    packed_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    """The same, for packing it: in bytes of what is packed."""
    sampled_values_per_s: float
    """What logits pass through until a token is picked."""
    laid_out_values_per_s: float = math.inf
    """What weights that stay are brought into the kernel's layout at, once; inf: as they come."""
    visit_s: float
    """Fixed cost of one visit of a decoder layer: calls of kernels, with nothing to do in them."""
    piece_s: float = 0.0
    """What each further piece of a visit costs: its own attention, its own pages."""
    page_s: float = 0.0
    """What each page of a piece's cache costs, for a kernel's call of its own."""
    asynchronous: bool = False
    """Whether kernels are queued, and run while further ones are launched: then a visit takes as long
    as its launches or its work, whichever is longer, and not both."""

    def product_s(self, form: str, rows: float, values: float, *, streamed: bool) -> float:
        """Products of so many rows with weights of so many values."""
        curves = self.products
        if streamed and form in self.streamed_products:
            curves = self.streamed_products
        if form not in curves:
            raise UsageError(
                f"this machine's file has no rate of products in {form}; it has "
                f"{', '.join(sorted(curves))}"
            )
        return curves[form].seconds(rows, values)

    def touch_s(self, prompt_tokens: float, steps: float, values: float) -> float:
        """What so many tokens of prompts, and of decode steps, pass through, `values` each."""
        stepped_per_s = self.stepped_values_per_s or self.touched_values_per_s
        return values * (prompt_tokens / self.touched_values_per_s + steps / stepped_per_s)

    def decode_s(self, codec: str, values: float) -> float:
        """Numbers of packed weights."""
        rate = self.decoded_values_per_s.get(codec, self.memory_bytes_per_s / 4)
        return values / rate

    def unpack_s(self, codec: str, num_bytes: float) -> float:
        """A packed cache that becomes so many bytes."""
        return num_bytes / self.unpacked_bytes_per_s.get(codec, self._cache_bytes_per_s)

    def pack_s(self, codec: str, num_bytes: float) -> float:
        """So many bytes of cache that are packed."""
        return num_bytes / self.packed_bytes_per_s.get(codec, self._cache_bytes_per_s)

    @property
    def _cache_bytes_per_s(self) -> float:
        return self.cache_bytes_per_s[min(self.cache_bytes_per_s)]

    def cache_read_s(self, queries: int, num_bytes: float) -> float:
        """Decode steps over so many bytes of cache, `queries` to a key/value head."""
        known = sorted(self.cache_bytes_per_s)
        at = max((each for each in known if each <= queries), default=known[0])
        return num_bytes / self.cache_bytes_per_s[at] * max(1.0, queries / at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A whole machine, as far as a plan needs it."""

    name: str
    about: str
    """What it is, for people."""
    backend: str
    """The plug-in that runs there."""
    dtypes: tuple[str, ...]
    """dtypes worth computing in, best first."""
    unified: bool
    addressable: bool
    page_tokens: int
    device_bytes: int
    """Memory that a run may use if nobody says how much, a margin left out."""
    host_bytes: int
    """The same beside the device; 0 where memory is unified."""
    disk_bytes: int
    disk_read: Lane
    """Past the page cache, from the folder of the checkpoint."""
    disk_write: Lane
    up: Lane | None
    """Host to device; None where nothing is copied between the two."""
    down: Lane | None
    device: Computer
    host: Computer | None
    """The CPU beside a device with memory of its own."""
    crossing_s: float = 0.0
    """What a layer takes longer because the device waits for the CPU beside it."""
    computing_share: float = 1.0
    """What is left of the device's rates while the disk is read at its full rate: both may want
    the same cores and the same memory."""
    reading_share: float = 1.0
    """What is left of the disk's rate while the device computes."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """By field ("disk_read", "device.products"), one of SOURCES and, after a colon, more about it.
    "" is for all that are not named."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Of a machine that was measured: what the numbers hold for, such as its processor and the
    versions of what computes. Where one of these differs, they don't. A machine that comes with
    flexport has its device's name here, by which it is found for others like it."""

    def __post_init__(self) -> None:
        if self.unified == (self.host is not None):
            raise UsageError(
                f"machine {self.name}: a CPU beside the device (host) is for memory that is not unified"
            )
        if (self.up is None or self.down is None) and not self.addressable:
            raise UsageError(f"machine {self.name}: up and down may be null where the device's memory "
                             "is addressable")  # fmt: skip
        bad = sorted({text for text in self.sources.values() if _kind(text) not in SOURCES})
        if bad:
            raise UsageError(f"machine {self.name}: a source is one of {SOURCES}, not {bad}")

    def source_of(self, name: str) -> str:
        """Where a field's numbers come from."""
        return self.sources.get(name, self.sources.get("", "estimated"))

    @property
    def is_measured(self) -> bool:
        """Whether all numbers were measured."""
        return bool(self.sources) and all(
            _kind(text) == "measured" for text in self.sources.values()
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `machine_from_dict` takes it."""
        return {"format": FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """The machine file's text."""
        return json.dumps(_finite(self.to_dict()), indent=1)


def read_machine(path: Path) -> Machine:
    """The machine of a file; raises UsageError, naming the file, if it holds none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read the machine file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"the machine file {path} is not JSON: {error}") from error
    try:
        return machine_from_dict(data)
    except UsageError as error:
        raise UsageError(f"the machine file {path}: {error}") from error


def machine_from_dict(data: Any) -> Machine:
    """The machine of plain data. Raises UsageError for what is missing, unknown or ill-typed."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        found = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise UsageError(
            f"not a machine file of format {FORMAT}: {found!r}; run `flexport profile`"
        )
    values = {name: value for name, value in data.items() if name != "format"}
    for name in ("disk_read", "disk_write", "up", "down"):
        if values.get(name) is not None:
            values[name] = _record(Lane, values[name], name)
    for name in ("device", "host"):
        if values.get(name) is not None:
            values[name] = _computer(values[name], name)
    if isinstance(values.get("dtypes"), list):
        values["dtypes"] = tuple(values["dtypes"])
    return _record(Machine, values, "machine")


def _computer(data: Any, name: str) -> Computer:
    values = dict(data) if isinstance(data, dict) else {}
    for curves in ("products", "streamed_products"):
        if isinstance(values.get(curves), dict):
            values[curves] = {
                form: _record(
                    Curve, {key: tuple(of) for key, of in curve.items()}, f"{name}.{curves}.{form}"
                )
                for form, curve in values[curves].items()
            }
    if isinstance(values.get("cache_bytes_per_s"), dict):
        values["cache_bytes_per_s"] = {
            int(queries): rate for queries, rate in values["cache_bytes_per_s"].items()
        }
    if values.get("laid_out_values_per_s", 0) is None:
        values["laid_out_values_per_s"] = math.inf
    return _record(Computer, values, name)


def _record(kind: type[Record], data: Any, name: str) -> Record:
    """A record of plain data, each number and each truth value in it checked to be one."""
    if not isinstance(data, dict):
        raise UsageError(f"{name} is {data!r}, not an object")
    hints = get_type_hints(kind)
    known = set(hints)
    unknown = sorted(set(data) - known)
    if unknown:
        raise UsageError(f"{name} has no field {unknown}; it has {sorted(known)}")
    for key, value in data.items():
        if hints[key] is bool and not isinstance(value, bool):
            raise UsageError(f"{name}.{key} must be true or false, got {value!r}")
        if hints[key] not in (int, float, float | None) or (
            value is None and hints[key] == float | None
        ):
            continue
        if not (_is_number(value) and value >= 0):
            raise UsageError(f"{name}.{key} must be a number >= 0, got {value!r}")
        if key.endswith("_per_s") and not value > 0:
            raise UsageError(f"{name}.{key} is a rate, and must be more than 0")
    try:
        return kind(**data)
    except TypeError as error:
        raise UsageError(f"{name}: {error}") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _kind(source: str) -> str:
    return source.partition(":")[0].strip()


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and math.isinf(value) else value

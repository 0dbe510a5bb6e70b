"""The contract between flexport's core and a device: five verbs and one record.

A backend owns a device's memory, its copies and its two expensive kernels. Everything else
(norms, activations, residuals) is plain torch on the tensors that `allocate` returned, so the
contract has no model words in it. The suite in `flexport.testing` is the meaning of this page.

Dimension key: T tokens, D features in, F features out, N rows, H query heads, K key/value heads
(H is a multiple of K), L new tokens a row, G columns of a page, E features of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "API",
    "AttentionSpec",
    "Backend",
    "BackendPlugin",
    "Capabilities",
    "MultipliesPacked",
    "PackedMatrix",
    "PacksWeights",
    "Ticket",
]

API = 1
"""The version of this contract. A plug-in made for another one is listed, not used."""


@runtime_checkable
class Ticket(Protocol):
    """A copy under way."""

    def wait(self) -> None:
        """Order all device work issued from now on after the copy. Raises what the copy raised.

        Returns at once where the device has queues of its own; on a device that computes in the
        calling thread it blocks.
        """

    def join(self) -> None:
        """Block the calling thread until the copy is done. Raises what the copy raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What the core may know of a device. It asks for this record, never for a name."""

    name: str
    """For people, e.g. "cpu (AMD EPYC, 2 cores)"."""
    memory_bytes: int
    """Memory that a run may use when the user sets no cap: what is free now, less a margin."""
    unified: bool
    """Device and host memory are one pool under one cap; what both hold takes it twice."""
    dtypes: tuple[str, ...]
    """dtypes worth computing in, best first, from "float32", "bfloat16", "float16"."""
    dtype_reason: str
    """Why the first of `dtypes` comes first, in words a user understands."""
    page_tokens: int
    """Columns of a KV page that the attention kernel likes best."""
    keys_by_feature: bool = False
    """The kernel likes a page's keys feature by feature in memory, (E, G), not column by column;
    `attention`, which has to take either, is then given a transposed view of such pages."""
    addressable: bool = False
    """Device tensors are host tensors, which the host reads and writes in place, so that nothing
    is copied between the two. Only where memory is unified, and not everywhere there."""

    def __post_init__(self) -> None:
        if self.addressable and not self.unified:
            raise ValueError(f"{self.name}: memory that the host addresses is unified, too")


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What `attention` may see. Rows are aligned at the right: all end in the same column.

    Columns 0 .. length-1 of the cache are filled. Row n owns the columns starts[n] .. length-1
    (its position is column - starts[n]); None means that every row starts at column 0. The L
    queries of a row are its last L columns, and every query is a real token:
    starts[n] <= length - L.
    """

    length: int
    scale: float
    starts: tuple[int, ...] | None = None
    causal: bool = True
    window: int | None = None
    """A query sees the last `window` columns, its own included."""
    soft_cap: float | None = None
    """Scores become soft_cap * tanh(score / soft_cap)."""
    slopes: tuple[float, ...] | None = None
    """ALiBi, one a query head: score += slope * (key column - query column)."""
    sinks: Tensor | None = None
    """One a query head: an extra logit that takes part in the softmax and has no value."""


class Backend(Protocol):
    """Five verbs and a record. All may be called from any thread.

    Where memory is unified, the core computes and starts copies in one thread, and others only
    join tickets: such a device has no link that a thread of its own would keep busy.
    """

    @property
    def capabilities(self) -> Capabilities:
        """What this device is; constant while it is open."""

    def allocate(
        self, shape: Sequence[int], dtype: torch.dtype, where: Literal["device", "host"] = "device"
    ) -> Tensor:
        """An uninitialised, contiguous tensor on the device, or in host memory fit for its copies.

        It lives until its last reference goes. Raises OutOfMemory.
        """

    def copy_async(self, src: Tensor, dst: Tensor) -> Ticket:
        """Start dst[:] = src between host and device memory, in either direction, or within one.

        Same shape and dtype, any strides; unlike tensors are an error, raised here or by the
        ticket. The copy is ordered after all device work issued before the call,
        and holds both tensors until it is done. Source and destination must not overlap.
        """

    def matmul(self, x_TD: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias, shape (T, F) in x's dtype, accumulated in float32 or better.

        `weight_FD` is a device tensor, or what this backend's `pack` made of one. The result has
        memory of its own. Device work, ordered among plain torch's. Raises OutOfMemory.
        """

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor:
        """Softmax attention over a cache that lies in pages; shape (N, H, L, E) in q's dtype.

        Page p holds the columns from the sum of the earlier pages' G on; the pages together hold
        at least spec.length columns, and what columns past it hold does not matter. Each page may
        have strides of its own. Query head h uses
        key/value head h // (H / K). Softmax in float32. The result has memory of its own. Device
        work, ordered among plain torch's. Raises OutOfMemory.
        """

    def sync(self) -> None:
        """Block until everything issued so far is done. Raises a copy's error, if any failed."""

    def close(self) -> None:
        """Give the device back. Later calls of other verbs are errors."""


@runtime_checkable
class PacksWeights(Protocol):
    """An optional power: a weight laid out once for this device's matrix kernel.

    Worth it for weights that stay: packing costs about as much as one product.
    """

    def pack(self, weight_FD: Tensor) -> Tensor:
        """An opaque tensor that `matmul` takes in place of `weight_FD`, of about the same size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedMatrix:
    """A matrix (F, D) of few bits a number, as `MultipliesPacked` gets it: on the device.

    "int8": codes, int8 (F, D), and scales, float32 (F); a value is code * scale.

    "int4": codes, uint8 (B, D, 32), and scales with zeros, bfloat16 (B, G, 64, 2), in B tiles of 64
    rows, the last of which may have rows that belong to nothing. Byte i of a feature holds row i of
    the tile in its lower half and row i + 32 in its upper half; `group` neighbouring features of a
    row share a scale and a zero. A value is (code - 8) * scale + zero.
    """

    form: Literal["int8", "int4"]
    parts: tuple[Tensor, ...]
    shape: tuple[int, int]
    group: int = 0


@runtime_checkable
class MultipliesPacked(Protocol):
    """An optional power: products with matrices as they are packed.

    Where a backend has not got it, or says no, the core decodes a matrix once a layer and sweep.
    """

    def multiplies(self, form: str, dtype: torch.dtype, num_tokens: int) -> bool:
        """Whether it should be asked, in place of decoding, for products in `dtype`.

        num_tokens are those of the product and of all earlier ones with the same copy of the matrix.
        In float32, products must be of the exact values; in a narrower dtype, activations may be
        rounded to 8 bits, each token by itself.
        """

    def settle(self, matrix: PackedMatrix, dtype: torch.dtype) -> PackedMatrix | None:
        """The matrix laid out once for all products in `dtype`, opaque, of about the same size.

        It has memory of its own and is never decoded. None: it stays as it is packed.
        """

    def matmul_packed(
        self, x_TD: Tensor, matrices: Sequence[PackedMatrix], biases_F: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """x @ matrix.T + bias for each, (T, F) in x's dtype; otherwise as `Backend.matmul`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendPlugin:
    """What an entry point in the group `flexport.backends` names. Making one does nothing heavy."""

    api: int
    """The contract it was written for; compare with `flexport.backend.API`."""
    rank: int
    """`--backend auto` takes the usable plug-in of the highest rank. The CPU has 10."""
    probe: Callable[[], str | None]
    """None if usable here, else the reason why not. Must not import torch, and be quick."""
    open: Callable[[], Backend]
    """Opens the device. May import what it likes."""
    describe: Callable[[], Capabilities | None] | None = None
    """What the open device will say of itself, as far as that can be known without torch, in
    some milliseconds: a run that can't fit is then refused at once. Called only if usable."""
    open_index: Callable[[int], Backend] | None = None
    """Opens the device of that number, counted from 0, as `--backend NAME:1` asks for; `open`
    takes the one that the plug-in thinks best. None: there is never more than one."""
    describe_index: Callable[[int], Capabilities | None] | None = None
    """As `describe`, of the device of that number."""

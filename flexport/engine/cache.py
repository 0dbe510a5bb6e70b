"""The KV cache of one batch: bands of rows, pages of columns, each page a bundle of the store.

A **band** is the rows of a batch that are at home on the same tier in one layer. A **page** holds
some columns of a band's keys and values: wide ones for the prompt, which prefill fills row by row
and nobody changes any more, narrow ones for what is decoded. The newest of these grows with every
step, and waits in memory if its home is the disk, until it is complete. So whatever a home is, it
sees whole contiguous records.

Where a CPU stands beside the device, decode steps of bands at home on host or disk are attended
there: the newest page is written where it lies, and pages on disk come as far as host memory.

A layer with a window keeps what a step can still see. Of a prompt that is longer than that, there
is room for its last columns only; until it is complete, they are the last ones it has come to, and
move up with each chunk. Later a page goes when it has left the window.

A cache that is kept in 8 or 4 bits is packed page by page: a prompt's pages when its row's prompt is
complete, a page of decoded tokens when its last column is filled; till then it is exact. To be
attended to, pages are unpacked, some rows of one layer at a time. A prompt that comes in chunks
passes a layer chunk after chunk, and is kept exact for as long, beside the pages.

Where decode steps add up few values (`engine/sparse_step`), those that are not in place stay at home,
and only keys are fetched ahead; but of the page that the step writes to, all is.

Rows that have ended are left out of all computing at once; their share of a page goes when less
than half of a band's rows live, so that all the copying together costs no more than one pass.

Dimension key: N rows of a band, K key/value heads, G columns of a page, E features of a head.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from flexport.backend import Ticket
from flexport.engine.packed_pages import PackedShape, pack, unpack
from flexport.engine.pages import CacheShape, PageShape
from flexport.errors import OutOfMemory
from flexport.planner.columns import edges_of, first_seen, most_kept
from flexport.planner.footprint import UNPACKED_BYTES
from flexport.policy import Tier
from flexport.schedule.order import Piece
from flexport.store.place import Dealer
from flexport.store.pool import Buffer, Promise
from flexport.store.store import Kept, Lease, Store

__all__ = ["Band", "BatchCache", "Held", "HeldBands"]


@dataclass(slots=True, eq=False)
class Band:
    """Rows of a batch that share pages in one layer."""

    rows: list[int]
    home: Tier
    shape: PageShape
    attended: Tier
    """Where decode steps are computed: on the device, or on the CPU in host memory."""
    base: int
    """The batch's column that is the pages' first, when the prompt is complete."""
    edges: list[int]
    """The first column of each page, counted from base, and the end of the last one."""
    num_prompt_pages: int
    moves: bool
    """The prompt's pages have room for its last columns only: what they hold of a row moves up."""
    pages: dict[int, Kept] = field(default_factory=dict)
    """By number; those that no step will see any more are gone."""
    num_made: int = 0
    """The number of the next page."""
    promised_bytes: int = 0
    """Memory that is set aside for pages to come."""
    exact: int | None = None
    """Where pages are packed, the newest one's number as long as it is not."""
    prompt: Buffer | None = None
    """Where pages are packed, what is there of a prompt that comes in chunks, while it does."""

    def form(self, number: int) -> PageShape | PackedShape:
        """What a page looks like."""
        packed = self.shape.packed
        return self.shape if packed is None or number == self.exact else packed

    def first_column(self, stop: int) -> int:
        """The batch's column that is the pages' first, when prompts have come to column `stop`."""
        return stop - self.edges[self.num_prompt_pages] if self.moves else self.base

    def page_of(self, column: int) -> int:
        """The number of the page that holds a column, counted from the pages' first."""
        return bisect_right(self.edges, column) - 1


@dataclass(slots=True, eq=False)
class Held:
    """Some rows of a band, and their part of its pages, as one visit holds them."""

    band: Band
    begin: int
    end: int
    near: Tier
    """Where the visit computes on them."""
    leases: dict[int, Lease] = field(default_factory=dict)
    """By number of the page."""
    changed: set[int] = field(default_factory=set)
    """Numbers of the pages that the visit has written to."""
    far: set[int] = field(default_factory=set)
    """Numbers of the pages whose values stayed at home: the band's first ones, or none."""

    @property
    def rows(self) -> list[int]:
        """The batch's rows that are held."""
        return self.band.rows[self.begin : self.end]


HeldBands = list[Held]
"""What a visit holds of a batch's cache."""


class BatchCache:
    """The cache of one batch, layer by layer. Lives until `drop`."""

    def __init__(
        self,
        shape: CacheShape,
        store: Store,
        lengths: Sequence[int],
        dealers: Mapping[PageShape, Dealer],
        max_columns: int,
        host_shape: CacheShape | None = None,
        *,
        keys_alone: bool = False,
    ) -> None:
        """`lengths` are the rows' prompt lengths.

        Each kind of layer's dealer says which rows are at home on which tier, layer by layer. Memory
        for max_columns columns (0: nothing is kept) is set aside at once; raises OutOfMemory if there
        is not enough, and then nothing is. Given a host_shape, decode steps of rows at home on
        host or disk are computed on the CPU, and their pages look like that. With keys_alone, decode
        steps fetch no values of pages that they don't write to.
        """
        self._shape = shape
        self._host_shape = host_shape
        self._keys_alone = keys_alone
        self._store = store
        self._lengths = list(lengths)
        self._columns = max(lengths)
        self._max_columns = max_columns
        self._bands: list[list[Band]] = [
            self._cut(dealers, layer) for layer in range(len(shape.layers))
        ]
        self._promises = {pool: Promise(pool, 0) for pool in (store.device, store.host)}
        self.claim_bytes = (0, 0)
        """Of device and host memory, what was set aside: all that the cache will ever take."""
        try:
            for band in (band for layer in self._bands for band in layer):
                self._promise(band)
        except OutOfMemory:
            self._close_promises()
            raise
        claims = {pool: promise.left_bytes for pool, promise in self._promises.items()}
        self.claim_bytes = (claims[store.device], 0 if store.unified else claims[store.host])

    def _cut(self, dealers: Mapping[PageShape, Dealer], layer: int) -> list[Band]:
        bands = []
        shape = self._shape.layers[layer]
        for part in dealers[shape].cut([(len(self._lengths), 1)]):
            rows = list(range(part.begin, part.end))
            longest = max(self._lengths[row] for row in rows)
            decoded = max(0, self._max_columns - self._columns)
            of_prompt: tuple[int, ...] = ()
            of_decoded: tuple[int, ...] = ()
            if self._max_columns:
                of_prompt, of_decoded = shape.widths(longest, decoded, self._shape.page_tokens)
            host_shape = None if part.tier is Tier.DEVICE else self._host_shape
            bands.append(
                Band(
                    rows=rows,
                    home=part.tier,
                    shape=(host_shape or self._shape).layers[layer],
                    attended=Tier.HOST if host_shape else Tier.DEVICE,
                    base=self._columns - sum(of_prompt),
                    edges=edges_of((*of_prompt, *of_decoded)),
                    num_prompt_pages=len(of_prompt),
                    moves=sum(of_prompt) < longest,
                )
            )
        return bands

    def _promise(self, band: Band) -> None:
        """Set aside what the band's pages to come will take of memory, no more and no less."""
        pool = self._store.pool(band.home)
        num_rows, shape = len(band.rows), band.shape
        edges = band.edges if band.rows else [0]
        widths = [stop - start for start, stop in pairwise(edges)]
        if band.home is Tier.DISK:
            # Pages at home on disk pass through memory one by one, as they are decoded.
            is_open = any(page.home is not Tier.DISK for page in band.pages.values())
            to_come = widths[max(band.num_made, band.num_prompt_pages) :]
            wanted_bytes = shape.page_bytes(num_rows, 0 if is_open else max(to_come, default=0))
        else:
            cut = band.num_prompt_pages
            sizes, beside = shape.page_sizes(num_rows, widths[:cut], widths[cut:])
            first = band.num_made if band.exact is None else band.exact
            most_bytes = most_kept(sizes, edges, shape.window, first, beside)
            kept_bytes = sum(page.num_bytes for page in band.pages.values())
            wanted_bytes = max(0, most_bytes - kept_bytes)
        if wanted_bytes > band.promised_bytes:
            more_bytes = wanted_bytes - band.promised_bytes
            self._promises[pool].add(more_bytes, self._store.wait_for_a_write)
        else:
            self._promises[pool].draw(band.promised_bytes - wanted_bytes)
        band.promised_bytes = wanted_bytes

    def _close_promises(self) -> None:
        for promise in self._promises.values():
            promise.close()

    # ---- what a visit moves

    def staging_bytes(self, layer: int, piece: Piece) -> tuple[int, int]:
        """Device and host bytes that `fetch` takes for the visit."""
        device_bytes, host_bytes = 0, 0
        for held in self._touched(layer, piece):
            for number in self._needed(held.band, piece):
                ranges = self._wanted(held, number, piece)
                page = held.band.pages[number]
                both = self._store.staging_bytes(page, ranges, held.near)
                device_bytes, host_bytes = device_bytes + both[0], host_bytes + both[1]
        return device_bytes, host_bytes

    def fetch(self, layer: int, piece: Piece) -> HeldBands:
        """Start fetching the pages that the piece attends to."""
        touched = self._touched(layer, piece)
        for held in touched:
            for number in self._needed(held.band, piece):
                page, ranges = held.band.pages[number], self._wanted(held, number, piece)
                lease = held.leases[number] = self._store.fetch(page, ranges, held.near)
                if not lease.in_place and self._has_keys_alone(held.band, number, piece):
                    held.far.add(number)
        return touched

    def tickets(self, held: HeldBands) -> list[Ticket]:
        """What the visit has to wait for."""
        return [lease.ticket for of_band in held for lease in of_band.leases.values()]

    def write_back(self, held: HeldBands, piece: Piece, live: Sequence[int]) -> None:
        """Send home what the visit changed, let the rest go, and shed rows that have ended."""
        alive = set(live)
        for of_band in held:
            band = of_band.band
            num_live = sum(row in alive for row in band.rows)
            if piece.rows is None:
                self._drop_unseen(of_band, piece.stop)
                if num_live:
                    self._pack_complete(of_band, piece.stop)
                if num_live and self._should_shrink(of_band, num_live):
                    self._shrink(of_band, alive, piece.stop)
                    continue
            for number, lease in of_band.leases.items():
                if number in of_band.changed:
                    self._return(band, number, lease, piece.stop)
                else:
                    lease.release()
            if piece.rows is None and not num_live:
                self._drop_band(band)

    def release(self, held: HeldBands) -> None:
        """Let go of pages that were fetched for nothing."""
        for of_band in held:
            for lease in of_band.leases.values():
                lease.release()

    def drop(self) -> None:
        """Forget everything."""
        for layer in self._bands:
            for band in layer:
                self._drop_band(band)
        self._close_promises()

    # ---- what attention reads and writes

    def start(self, row: int) -> int:
        """The batch's column of a row's first token."""
        return self._columns - self._lengths[row]

    def views(self, held: Held, number: int) -> tuple[Tensor, ...]:
        """Keys and values of the held rows of a page, each (N, K, G, E); or packed ones.

        Of a page that is far, keys alone.
        """
        low, high = held.band.edges[number : number + 2]
        lease, form = held.leases[number], held.band.form(number)
        if number in held.far:
            return form.keys(lease.bytes_B, held.end - held.begin, high - low)
        if not lease.in_place:
            return form.views(lease.bytes_B, held.end - held.begin, high - low)
        views = form.views(lease.bytes_B, len(held.band.rows), high - low)
        return tuple(view[held.begin : held.end] for view in views)

    def changing(self, held: Held, number: int) -> tuple[Tensor, ...]:
        """The same, to be written to; what is not held of it yet is undefined."""
        if number not in held.leases:
            page, ranges = held.band.pages[number], self._ranges(held, number)
            held.leases[number] = self._store.draft(page, ranges, held.near)
        held.changed.add(number)
        return self.views(held, number)

    def pages(self, held: Held, first: int, last: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of some of the held rows, page by page; of pages that are far, keys."""
        views = [self.views(held, number) for number in sorted(held.leases)]
        near = views[len(held.far) :]
        return [page[0][first:last] for page in views], [page[1][first:last] for page in near]

    def unpacked(
        self, held: Held, wanted: Literal["both", "keys", "values"] = "both"
    ) -> Iterator[tuple[int, int, list[Tensor], list[Tensor]]]:
        """First and last of some held rows, and their keys and values page by page; then others.

        What is packed is unpacked for as many rows as there is room for; it is valid until the next
        ones are asked for. What is not `wanted` is undefined, and values of pages that are far are
        not among them.
        """
        band, num_rows = held.band, held.end - held.begin
        numbers = sorted(held.leases)[len(held.far) if wanted == "values" else 0 :]
        packed = band.shape.packed
        widths = {
            number: band.edges[number + 1] - band.edges[number]
            for number in numbers
            if number != band.exact
        }
        if packed is None or not widths:
            yield 0, num_rows, *self.pages(held, 0, num_rows)
            return
        planes = {"both": slice(2), "keys": slice(1), "values": slice(1, 2)}[wanted]
        row_bytes = sum(band.shape.page_bytes(1, width) for width in widths.values())
        at_once = min(num_rows, max(1, UNPACKED_BYTES // row_bytes))
        pool = self._store.pool(held.near)
        buffer = pool.take(at_once * row_bytes, self._store.wait_for_a_write)
        try:
            for first in range(0, num_rows, at_once):
                last = min(first + at_once, num_rows)
                keys, values, at = [], [], 0
                for number in numbers:
                    views = tuple(view[first:last] for view in self.views(held, number))
                    if number in widths:
                        width = widths[number]
                        page = band.shape.views(buffer.bytes_B[at:], last - first, width)
                        unpack(packed, views, page, planes)
                        at += band.shape.page_bytes(last - first, width)
                        views = page
                    keys.append(views[0])
                    if number not in held.far:
                        values.append(views[1])
                yield first, last, keys, values
        finally:
            pool.give_back(buffer)

    def new_page(self, band: Band, *, is_open: bool) -> None:
        """The band's next page, at its home; one that is open goes on growing for some steps."""
        if is_open and band.shape.packed is not None:
            band.exact = band.num_made
        self._make_page(band, band.num_made, is_open=is_open)
        band.num_made += 1

    def send(self, held: Held, number: int) -> None:
        """Send a page home that is complete, and that the visit does not ask for any more."""
        held.changed.discard(number)
        self._store.write_back(held.band.pages[number], held.leases.pop(number))

    # ---- prompts in chunks, where pages are packed

    def is_chunk(self, piece: Piece) -> bool:
        """Whether the piece is a part of a prompt."""
        assert piece.rows is not None, piece
        return piece.stop < self._columns or self.start(piece.rows[0]) < piece.start

    def is_complete(self, piece: Piece) -> bool:
        """Whether its rows' prompts end with the piece."""
        return piece.stop == self._columns

    def prompt(self, held: Held) -> tuple[Tensor, Tensor]:
        """Room for keys and values of the held row's prompt, each (1, K, L, E).

        It holds what was written to it since it was first asked for, until `end_prompt`.
        """
        band, (row,) = held.band, held.rows
        length = self._lengths[row]
        if band.prompt is None:
            num_bytes = band.shape.page_bytes(1, length)
            band.prompt = self._store.device.take(num_bytes, self._store.wait_for_a_write)
        return band.shape.views(band.prompt.bytes_B, 1, length)

    def end_prompt(self, band: Band) -> None:
        """What `prompt` gave is not needed any more."""
        if band.prompt is not None:
            self._store.device.give_back(band.prompt)
            band.prompt = None

    # ---- inside

    def _touched(self, layer: int, piece: Piece) -> HeldBands:
        """The bands that the piece has rows of, nothing fetched yet."""
        touched = []
        for band in self._bands[layer]:
            if piece.rows is None:
                touched.append(Held(band, 0, len(band.rows), band.attended))
                continue
            # No row is shed before the first decode step, so a band's rows are a range.
            begin, end = (
                min(max(row - band.rows[0], 0), len(band.rows)) if band.rows else 0
                for row in piece.rows
            )
            if begin < end:
                touched.append(Held(band, begin, end, Tier.DEVICE))
        return touched

    def _needed(self, band: Band, piece: Piece) -> Iterable[int]:
        """Numbers of the pages that hold what the piece attends to and does not bring itself."""
        if piece.rows is None:
            return band.pages
        if band.shape.packed is not None:
            return ()
        if all(self.start(row) >= piece.start for row in range(*piece.rows)):
            return ()
        last_column = piece.start - 1 - band.first_column(piece.start)
        return range(band.page_of(last_column) + 1)

    def _has_keys_alone(self, band: Band, number: int, piece: Piece) -> bool:
        """Whether the piece needs no more than the keys of a page, if values can stay at home."""
        return (
            self._keys_alone
            and piece.rows is None
            and number < band.page_of(piece.start - band.base)
        )

    def _wanted(self, held: Held, number: int, piece: Piece) -> list[tuple[int, int]] | None:
        """What is fetched of a page; None is all of it."""
        band = held.band
        if not self._has_keys_alone(band, number, piece):
            return self._ranges(held, number)
        low, high = band.edges[number : number + 2]
        num_rows = len(band.rows)
        return band.form(number).row_ranges(0, num_rows, num_rows, high - low)[:1]

    def _page_bytes(self, band: Band, number: int, num_rows: int | None = None) -> int:
        """Bytes of a page, of all the band's rows or of so many."""
        low, high = band.edges[number : number + 2]
        num_rows = len(band.rows) if num_rows is None else num_rows
        return band.form(number).page_bytes(num_rows, high - low)

    def _ranges(self, held: Held, number: int) -> list[tuple[int, int]] | None:
        """Where in a page the held rows lie; None is all of it."""
        low, high = held.band.edges[number : number + 2]
        if held.end - held.begin == len(held.band.rows):
            return None
        form = held.band.form(number)
        return form.row_ranges(held.begin, held.end, len(held.band.rows), high - low)

    def _make_page(self, band: Band, number: int, *, is_open: bool) -> None:
        num_bytes = self._page_bytes(band, number)
        if band.home is not Tier.DISK or is_open:
            pool = self._store.pool(band.home)
            drawn_bytes = min(pool.rounded(num_bytes), band.promised_bytes)
            band.promised_bytes -= drawn_bytes
            self._promises[pool].draw(drawn_bytes)
        keep = self._store.keep_open if is_open else self._store.keep
        # What is not packed yet makes way for what is, and has no home of its own.
        kind = "newest cache" if number == band.exact else "cache"
        band.pages[number] = keep(kind, num_bytes, band.home)

    def _pack_complete(self, held: Held, stop: int) -> None:
        """Pack the newest page if its last column is filled, and later steps see it."""
        band, number, packed = held.band, held.band.exact, held.band.shape.packed
        if number is None or packed is None:
            return
        if not stop - band.base == band.edges[number + 1] < band.edges[-1]:
            return
        exact = self.views(held, number)
        kept, lease = band.pages.pop(number), held.leases.pop(number)
        held.changed.discard(number)
        band.exact = None
        self._make_page(band, number, is_open=False)
        pack(packed, exact, self.changing(held, number))
        lease.release()
        self._store.drop(kept)
        self._promise(band)

    def _return(self, band: Band, number: int, lease: Lease, stop: int) -> None:
        """Send a changed page home; for good, if its last column is filled.

        Unless that is the very last one, after which nothing is read any more.
        """
        kept = band.pages[number]
        self._store.write_back(kept, lease)
        is_full = stop - band.base == band.edges[number + 1] < band.edges[-1]
        if kept.home is not band.home and is_full:
            self._store.settle(kept)
            self._promise(band)

    def _drop_unseen(self, held: Held, column: int) -> None:
        """Drop the pages that the step in a column of the batch, and those after it, won't see."""
        band = held.band
        first = first_seen(band.edges, column - band.base, band.shape.window)
        gone = [number for number in band.pages if number < first]
        if band.exact in gone:
            band.exact = None
        for number in gone:
            held.leases.pop(number).release()
            held.far.discard(number)
            self._store.drop(band.pages.pop(number))
        if gone:
            self._promise(band)

    def _should_shrink(self, held: Held, num_live: int) -> bool:
        """Whether rewriting the pages pays, and there is room to do it page by page."""
        band = held.band
        return (
            2 * num_live < len(band.rows)
            and all(
                self._store.has_room(self._page_bytes(band, number, num_live), kept.home)
                for number, kept in band.pages.items()
            )
            and all(self._can_come_whole(held, number, num_live) for number in held.far)
        )

    def _can_come_whole(self, held: Held, number: int, num_live: int) -> bool:
        """Whether there is room for a page that is far, and for what is to stay of it."""
        needed = self._store.staging_bytes(held.band.pages[number], None, held.near)
        kept_bytes = self._page_bytes(held.band, number, num_live)
        return all(
            kept_bytes + num_bytes <= pool.free_bytes
            for num_bytes, pool in zip(needed, (self._store.device, self._store.host), strict=True)
        )

    def _shrink(self, held: Held, alive: set[int], stop: int) -> None:
        """Rewrite a band's pages without the rows that have ended."""
        band = held.band
        places = [index for index, row in enumerate(band.rows) if row in alive]
        rows = [band.rows[index] for index in places]
        smaller = Held(
            replace(band, rows=rows, pages={}, promised_bytes=0), 0, len(rows), held.near
        )
        for number, lease in sorted(held.leases.items()):
            if number in held.far:
                lease.release()
                lease = held.leases[number] = self._store.fetch(band.pages[number], None, held.near)
                lease.ticket.wait()
                held.far.discard(number)
            smaller.band.num_made = number
            is_open = stop - band.base < band.edges[number + 1]
            if band.shape.packed is not None:
                is_open = number == band.exact
            self.new_page(smaller.band, is_open=is_open)
            pairs = zip(self.changing(smaller, number), self.views(held, number), strict=True)
            for new_NKGE, old_NKGE in pairs:
                new_NKGE.copy_(old_NKGE[torch.tensor(places, device=old_NKGE.device)])
            self._store.write_back(smaller.band.pages[number], smaller.leases[number])
            lease.release()
            self._store.drop(band.pages[number])
        band.rows, band.pages = rows, smaller.band.pages
        self._promise(band)

    def _drop_band(self, band: Band) -> None:
        for page in band.pages.values():
            self._store.drop(page)
        band.rows, band.pages, band.exact = [], {}, None
        self.end_prompt(band)
        self._promise(band)

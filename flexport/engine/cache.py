"""The KV cache of one batch: bands of rows, pages of columns, each page a bundle of the store.

A **band** is what rows of a batch have in common in one layer: they were prefilled in the same
visits and their cache is at home on the same tier. A **page** holds `page_tokens` columns of a
band's keys and values. A page is written once it is complete and then only read; the newest
page, which grows with every step, waits in memory if its home is the disk. So whatever a
home is, it sees whole contiguous records.

Rows that have ended are left out of all computing at once; their share of a page goes when less
than half of a band's rows live, so that all the copying together costs no more than one pass.

Dimension key: T tokens, N rows of a band, H query heads, K key/value heads, G columns of a page,
E features of a head, C new columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend, Ticket
from flexport.errors import OutOfMemory
from flexport.models.decoder import Attend
from flexport.models.spec import ModelSpec
from flexport.policy import Tier
from flexport.schedule.order import Piece
from flexport.store.place import Dealer
from flexport.store.pool import Promise
from flexport.store.store import Kept, Lease, Store
from flexport.torch_ops import as_tensor

__all__ = ["BatchCache", "CacheShape", "HeldBands"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """The numbers of a cache that are the same for every batch."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    page_tokens: int
    dtype: torch.dtype
    scale: float

    @classmethod
    def of(cls, spec: ModelSpec, page_tokens: int, dtype: torch.dtype) -> CacheShape:
        """The shape of a model's cache."""
        return cls(
            num_layers=spec.num_layers,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            page_tokens=page_tokens,
            dtype=dtype,
            scale=spec.attention_scale,
        )

    def page_shape(self, num_rows: int) -> tuple[int, int, int, int, int]:
        """(2, N, K, G, E): keys, then values."""
        return (2, num_rows, self.num_kv_heads, self.page_tokens, self.head_dim)

    def page_bytes(self, num_rows: int) -> int:
        """Bytes of one page of a band."""
        per_row = 2 * self.num_kv_heads * self.page_tokens * self.head_dim * self.dtype.itemsize
        return num_rows * per_row

    def num_pages(self, num_columns: int) -> int:
        """Pages that hold this many columns."""
        return -(-num_columns // self.page_tokens)


@dataclass(slots=True, eq=False)
class _Band:
    """Rows of a batch that share pages in one layer."""

    rows: list[int]
    home: Tier
    base: int
    """The batch's column that is the pages' first."""
    pages: list[Kept] = field(default_factory=list)
    length: int = 0
    """Columns filled so far."""
    promised_bytes: int = 0
    """Memory that is set aside for pages to come."""


@dataclass(slots=True, eq=False)
class _Held:
    """A band's pages as one visit holds them."""

    band: _Band
    leases: list[Lease]
    changed: set[int] = field(default_factory=set)
    """Numbers of the pages that the visit has written to."""


HeldBands = list[_Held]
"""What a visit holds of a batch's cache."""


class BatchCache:
    """The cache of one batch, layer by layer. Lives until `drop`."""

    def __init__(
        self,
        shape: CacheShape,
        store: Store,
        lengths: Sequence[int],
        bands: Sequence[tuple[int, int]],
        dealer: Dealer,
        max_columns: int,
    ) -> None:
        """`lengths` are the rows' prompt lengths, `bands` the row ranges prefilled together.

        The dealer says which rows of a band are at home on which tier, layer by layer. Memory for
        max_columns columns is set aside at once; raises OutOfMemory if there is not enough, and
        then nothing is.
        """
        self._shape = shape
        self._store = store
        self._backend: Backend = store.backend
        self._lengths = list(lengths)
        self._columns = max(lengths)
        self._bands: list[list[list[_Band]]] = [
            [self._cut(begin, end, dealer) for begin, end in bands] for _ in range(shape.num_layers)
        ]
        self._max_columns = max_columns
        self._promises = {pool: Promise(pool, 0) for pool in (store.device, store.host)}
        try:
            for band in (band for layer in self._bands for group in layer for band in group):
                self._promise(band)
        except OutOfMemory:
            self._close_promises()
            raise

    def _promise(self, band: _Band) -> None:
        """Set aside what the band's pages to come will take of memory, no more and no less."""
        num_pages = self._shape.num_pages(max(0, self._max_columns - band.base)) - len(band.pages)
        if not band.rows:
            num_pages = 0
        elif band.home is Tier.DISK:
            # Pages pass through memory one by one; the newest may be there already.
            is_open = bool(band.pages) and band.pages[-1].home is not Tier.DISK
            num_pages = min(num_pages, 0 if is_open else 1)
        pool = self._store.pool(band.home)
        wanted_bytes = num_pages * pool.rounded(self._shape.page_bytes(len(band.rows)))
        if wanted_bytes > band.promised_bytes:
            more_bytes = wanted_bytes - band.promised_bytes
            self._promises[pool].add(more_bytes, self._store.wait_for_a_write)
        else:
            self._promises[pool].draw(band.promised_bytes - wanted_bytes)
        band.promised_bytes = wanted_bytes

    def _close_promises(self) -> None:
        for promise in self._promises.values():
            promise.close()

    def _cut(self, begin: int, end: int, dealer: Dealer) -> list[_Band]:
        base = self._columns - max(self._lengths[begin:end])
        return [
            _Band(rows=list(range(begin + part.begin, begin + part.end)), home=part.tier, base=base)
            for part in dealer.cut([(end - begin, 1)])
        ]

    def _of(self, layer: int, piece: Piece) -> list[_Band]:
        if piece.band is not None:
            return self._bands[layer][piece.band]
        return [band for group in self._bands[layer] for band in group]

    # ---- what a visit moves

    def staging_bytes(self, layer: int, piece: Piece) -> tuple[int, int]:
        """Device and host bytes that `fetch` takes for the visit."""
        device_bytes, host_bytes = 0, 0
        for band in self._of(layer, piece):
            for page in band.pages:
                for_device, for_host = self._store.staging_bytes(page)
                device_bytes += for_device
                host_bytes += for_host
        return device_bytes, host_bytes

    def fetch(self, layer: int, piece: Piece) -> HeldBands:
        """Start fetching the pages that the piece attends to."""
        return [
            _Held(band, [self._store.fetch(page) for page in band.pages])
            for band in self._of(layer, piece)
        ]

    def tickets(self, held: HeldBands) -> list[Ticket]:
        """What the visit has to wait for."""
        return [lease.ticket for of_band in held for lease in of_band.leases]

    def attend(self, piece: Piece, live: Sequence[int], held: HeldBands, keep: bool) -> Attend:
        """What the decoder calls for the piece's new tokens.

        `live` are the batch's rows in the order of their tokens. With `keep` False the new keys
        and values are not stored: nothing will be asked of them later.
        """

        def attend(q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
            if piece.band is None:
                return self._decode(q_THE, k_TKE, v_TKE, live, held)
            return self._prefill(q_THE, k_TKE, v_TKE, piece, held, keep)

        return attend

    def write_back(self, held: HeldBands, live: Sequence[int]) -> None:
        """Send home what the visit changed, let the rest go, and shed rows that have ended."""
        alive = set(live)
        for of_band in held:
            band = of_band.band
            num_live = sum(row in alive for row in band.rows)
            if num_live and self._should_shrink(band, num_live):
                self._shrink(of_band, alive)
                continue
            for number, lease in enumerate(of_band.leases):
                if number in of_band.changed:
                    self._return(band, number, lease)
                else:
                    lease.release()
            if not num_live:
                self._drop_band(band)

    def release(self, held: HeldBands) -> None:
        """Let go of pages that were fetched for nothing."""
        for of_band in held:
            for lease in of_band.leases:
                lease.release()

    def drop(self) -> None:
        """Forget everything."""
        for layer in self._bands:
            for group in layer:
                for band in group:
                    self._drop_band(band)
        self._close_promises()

    # ---- prefill

    def _prefill(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        piece: Piece,
        held: HeldBands,
        keep: bool,
    ) -> Tensor:
        out_THE = torch.empty_like(q_THE)
        at = 0
        for of_band in held:
            band = of_band.band
            spans = []
            for row in band.rows:
                num_new = piece.stop - max(piece.start, self._start(row))
                spans.append((at, at + num_new))
                at += num_new
            if keep:
                self._append_prompt(of_band, spans, k_TKE, v_TKE, piece.stop)
            for first, last, whole in self._runs(band, spans, piece):
                begin, end = spans[first][0], spans[last - 1][1]
                count = last - first
                span_q = _rows_first(q_THE[begin:end], count)
                if whole:
                    keys = [_rows_first(k_TKE[begin:end], count)]
                    values = [_rows_first(v_TKE[begin:end], count)]
                    starts, length = None, span_q.shape[2]
                else:
                    keys, values = self._pages(of_band, first, last)
                    starts = tuple(
                        self._start(band.rows[n]) - band.base for n in range(first, last)
                    )
                    length = piece.stop - band.base
                spec = AttentionSpec(length=length, scale=self._shape.scale, starts=starts)
                o_NHLE = self._backend.attention(span_q, keys, values, spec)
                out_THE[begin:end].view(count, -1, *q_THE.shape[1:]).copy_(o_NHLE.transpose(1, 2))
        return out_THE

    def _runs(
        self, band: _Band, spans: Sequence[tuple[int, int]], piece: Piece
    ) -> list[tuple[int, int, bool]]:
        """Neighbouring rows of equal length, and whether all they attend to is in this piece."""
        runs: list[tuple[int, int, bool]] = []
        for index, row in enumerate(band.rows):
            num_new = spans[index][1] - spans[index][0]
            whole = self._start(row) >= piece.start
            if runs and runs[-1][2] == whole:
                first = runs[-1][0]
                if spans[first][1] - spans[first][0] == num_new:
                    runs[-1] = (first, index + 1, whole)
                    continue
            runs.append((index, index + 1, whole))
        return runs

    def _append_prompt(
        self,
        held: _Held,
        spans: Sequence[tuple[int, int]],
        k_TKE: Tensor,
        v_TKE: Tensor,
        stop: int,
    ) -> None:
        band, size = held.band, self._shape.page_tokens
        first, last = band.length, stop - band.base
        while len(band.pages) < self._shape.num_pages(last):
            self._new_page(held, complete=(len(band.pages) + 1) * size <= last)
        for number in range(first // size, self._shape.num_pages(last)):
            held.changed.add(number)
            page = self._view(held, number)
            for index, (begin, end) in enumerate(spans):
                # The row's tokens end in column `last`; those of this page are in the middle.
                low = max(number * size, last - (end - begin))
                high = min((number + 1) * size, last)
                if low < high:
                    tokens = slice(end - (last - low), end - (last - high))
                    columns = slice(low - number * size, high - number * size)
                    page[0, index, :, columns] = k_TKE[tokens].transpose(0, 1)
                    page[1, index, :, columns] = v_TKE[tokens].transpose(0, 1)
        band.length = last

    # ---- decode

    def _decode(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        live: Sequence[int],
        held: HeldBands,
    ) -> Tensor:
        token_of = {row: token for token, row in enumerate(live)}
        out_THE = torch.empty_like(q_THE)
        for of_band in held:
            band = of_band.band
            places = [index for index, row in enumerate(band.rows) if row in token_of]
            if not places:
                continue
            begin = token_of[band.rows[places[0]]]
            tokens = slice(begin, begin + len(places))
            q_NHE, k_NKE, v_NKE = q_THE[tokens], k_TKE[tokens], v_TKE[tokens]
            index_N: Tensor | None = None
            if len(places) < len(band.rows):
                index_N = torch.tensor(places, device=q_THE.device)
                q_NHE, k_NKE, v_NKE = (
                    _scatter(x, index_N, len(band.rows)) for x in (q_NHE, k_NKE, v_NKE)
                )
            self._append_step(of_band, k_NKE, v_NKE)
            starts = tuple(self._start(row) - band.base for row in band.rows)
            spec = AttentionSpec(
                length=band.length,
                scale=self._shape.scale,
                starts=starts if any(starts) else None,
            )
            keys, values = self._pages(of_band, 0, len(band.rows))
            o_NHE = self._backend.attention(q_NHE.unsqueeze(2), keys, values, spec).squeeze(2)
            out_THE[tokens] = o_NHE if index_N is None else o_NHE[index_N]
        return out_THE

    def _append_step(self, held: _Held, k_NKE: Tensor, v_NKE: Tensor) -> None:
        band = held.band
        number, column = divmod(band.length, self._shape.page_tokens)
        if number == len(band.pages):
            self._new_page(held, complete=False)
        held.changed.add(number)
        page = self._view(held, number)
        page[0, :, :, column] = k_NKE
        page[1, :, :, column] = v_NKE
        band.length += 1

    # ---- pages

    def _start(self, row: int) -> int:
        """The batch's column of a row's first token."""
        return self._columns - self._lengths[row]

    def _view(self, held: _Held, number: int) -> Tensor:
        shape = self._shape.page_shape(len(held.band.rows))
        return as_tensor(held.leases[number].bytes_B, 0, shape, self._shape.dtype)

    def _pages(self, held: _Held, first: int, last: int) -> tuple[list[Tensor], list[Tensor]]:
        views = [self._view(held, number)[:, first:last] for number in range(len(held.leases))]
        return [view[0] for view in views], [view[1] for view in views]

    def _new_page(self, held: _Held, complete: bool) -> None:
        band = held.band
        keep = self._store.keep if complete else self._store.keep_open
        num_bytes = self._shape.page_bytes(len(band.rows))
        if band.home is not Tier.DISK or not complete:
            pool = self._store.pool(band.home)
            drawn_bytes = min(pool.rounded(num_bytes), band.promised_bytes)
            band.promised_bytes -= drawn_bytes
            self._promises[pool].draw(drawn_bytes)
        band.pages.append(keep("cache", num_bytes, band.home))
        lease = self._store.draft(band.pages[-1])
        if any(self._start(row) > band.base for row in band.rows):
            # Columns before a row's start are masked, but 0 times what lies there must be 0.
            lease.bytes_B.zero_()
        held.leases.append(lease)

    def _return(self, band: _Band, number: int, lease: Lease) -> None:
        """Send a changed page home; for good, if its last column is filled."""
        kept = band.pages[number]
        self._store.write_back(kept, lease)
        complete = (number + 1) * self._shape.page_tokens <= band.length
        if complete and kept.home is not band.home:
            self._store.settle(kept)
            self._promise(band)

    def _should_shrink(self, band: _Band, num_live: int) -> bool:
        """Whether rewriting the pages pays, and there is room to do it page by page."""
        page_bytes = self._shape.page_bytes(num_live)
        return 2 * num_live < len(band.rows) and all(
            self._store.has_room(page_bytes, kept.home) for kept in band.pages
        )

    def _shrink(self, held: _Held, alive: set[int]) -> None:
        """Rewrite a band's pages without the rows that have ended."""
        band, size = held.band, self._shape.page_tokens
        places = [index for index, row in enumerate(band.rows) if row in alive]
        index_N = torch.tensor(places, device=held.leases[0].bytes_B.device)
        rows = [band.rows[index] for index in places]
        smaller = _Held(_Band(rows=rows, home=band.home, base=band.base, length=band.length), [])
        for number, lease in enumerate(held.leases):
            self._new_page(smaller, complete=(number + 1) * size <= band.length)
            view = self._view(held, number).index_select(1, index_N)
            self._view(smaller, number).copy_(view)
            self._store.write_back(smaller.band.pages[number], smaller.leases[number])
            lease.release()
            self._store.drop(band.pages[number])
        band.rows, band.pages = rows, smaller.band.pages
        self._promise(band)

    def _drop_band(self, band: _Band) -> None:
        for page in band.pages:
            self._store.drop(page)
        band.rows, band.pages = [], []
        self._promise(band)


def _rows_first(x_THE: Tensor, num_rows: int) -> Tensor:
    """Tokens of rows of equal length as (N, H, L, E); a view."""
    return x_THE.view(num_rows, -1, *x_THE.shape[1:]).transpose(1, 2)


def _scatter(x_THE: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    out_NHE = x_THE.new_zeros(num_rows, *x_THE.shape[1:])
    return out_NHE.index_copy_(0, index_N, x_THE)

"""Attention of a visit's pieces: every new token over its own row's cache, where that lives.

Rows whose cache is on the device, or comes there, are computed on it; decode steps of bands that
the CPU attends to cross to the host and back. That happens in rounds over all pieces of a
visit (what crosses sets out, the device is given its work, the CPU does its own), so that the two
compute at the same time. Steps that add up few values (`engine/sparse_step`) only choose in these
rounds, and there are three more, in which the values come and are added up.

Dimension key: T tokens, N rows of a band, H query heads, K key/value heads, C new columns, L new
tokens a row, E features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from flexport.backend import AttentionSpec, Backend
from flexport.engine.cache import BatchCache, Held, HeldBands
from flexport.engine.host_compute import Crossing, HostCompute
from flexport.engine.packed_pages import pack_prompt_page
from flexport.engine.sparse_step import SparseStep, Sparsity
from flexport.models.decoder import Attend
from flexport.models.spec import Attention, LatentAttention
from flexport.policy import Tier
from flexport.schedule.order import Piece
from flexport.torch_ops.attention import seen_pages

__all__ = ["PieceAttention", "attend_to", "common_to_rows"]


class _Attends(Protocol):
    """A backend, or the CPU beside one."""

    def attention(
        self,
        q_NHLE: Tensor,
        keys_NKGE: Sequence[Tensor],
        values_NKGE: Sequence[Tensor],
        spec: AttentionSpec,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class _New:
    """What a visit's tokens bring: one line a token, but for the sinks."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    """None: keys are values, too."""
    sinks: Tensor | None

    @property
    def values(self) -> Tensor:
        """What is added up by weight."""
        return self.k if self.v is None else self.v

    def of(self, tokens: slice) -> _New:
        """That of some tokens."""
        v = None if self.v is None else self.v[tokens]
        return _New(self.q[tokens], self.k[tokens], v, self.sinks)

    def tensors(self) -> list[Tensor]:
        """All there is."""
        return [x for x in (self.q, self.k, self.v, self.sinks) if x is not None]

    def made_of(self, tensors: Sequence[Tensor]) -> _New:
        """The same, of copies of its tensors."""
        left = iter(tensors)
        q, k = next(left), next(left)
        v = None if self.v is None else next(left)
        return _New(q, k, v, None if self.sinks is None else next(left))

    def scattered(self, index_N: Tensor, num_rows: int) -> _New:
        """The same, in the lines of so many rows, zeros between."""
        q, k = (_scatter(x, index_N, num_rows) for x in (self.q, self.k))
        v = None if self.v is None else _scatter(self.v, index_N, num_rows)
        return _New(q, k, v, self.sinks)


@dataclass(slots=True, eq=False)
class _Step:
    """A band's decode step: its live rows are neighbours among the piece's tokens."""

    held: Held
    tokens: slice
    places: list[int]
    """Of the live rows in the band."""
    index_N: Tensor | None = None
    """The same, where they are computed on, if other rows have ended."""
    crossing: Crossing | None = None
    sparse: SparseStep | None = None
    """What is under way of it, where few values are added up."""


class PieceAttention:
    """One piece's attention in one visit."""

    def __init__(
        self,
        backend: Backend,
        host: HostCompute | None,
        cache: BatchCache,
        piece: Piece,
        live: Sequence[int],
        held: HeldBands,
        *,
        attention: AttentionSpec,
        num_tokens: int,
        keep: bool,
        sparsity: Sparsity | None = None,
    ) -> None:
        """`attention` is what all rows of the layer have in common.

        `live` are the batch's rows in the order of their tokens, num_tokens together. With `keep` False the new keys and values are not stored: nothing will be asked of them.
        """
        self.num_tokens = num_tokens
        self._attention = attention
        self._backend = backend
        self._host = host
        self._cache = cache
        self._piece = piece
        self._held = held
        self._keep = keep
        self._sparsity = sparsity
        self._steps = list(_steps(live, held)) if piece.rows is None else []

    def send(self, new: _New, out_THE: Tensor) -> None:
        """What the CPU needs of the piece's tokens sets out."""
        for step in self._steps:
            if step.held.near is Tier.HOST:
                assert self._host is not None, "a band that the CPU attends to, and no CPU"
                step.crossing = self._host.send(new.of(step.tokens).tensors())

    def on_device(self, new: _New, out_THE: Tensor) -> None:
        """Give the device its part."""
        if self._piece.rows is not None:
            self._prefill(new, out_THE)
        for step in self._steps:
            if step.crossing is None:
                o_NHE = self._begin(step, self._backend, new.of(step.tokens))
                self._put(step, o_NHE, out_THE)

    def on_host(self, new: _New, out_THE: Tensor) -> None:
        """Compute the CPU's part, and send the result to the device."""
        for step in self._steps:
            if step.crossing is not None:
                assert self._host is not None, "something was sent to a CPU, and there is none"
                arrived = new.made_of(step.crossing.receive())
                o_NHE = self._begin(step, self._host, arrived)
                step.crossing.release()
                self._put(step, o_NHE, out_THE)

    def ask(self, new: _New, out_THE: Tensor) -> None:
        """Let what was chosen set out from disk."""
        for step in self._steps:
            if step.sparse is not None:
                step.sparse.ask()

    def take(self, new: _New, out_THE: Tensor) -> None:
        """Let it set out to where it is added up."""
        for step in self._steps:
            if step.sparse is not None:
                step.sparse.take()

    def add_up(self, new: _New, out_THE: Tensor) -> None:
        """Add up what has come."""
        for step in self._steps:
            if step.sparse is not None:
                with self._computing(step):
                    o_NHE = step.sparse.result()
                self._put(step, o_NHE, out_THE)

    # ---- prefill

    def _prefill(self, new: _New, out_THE: Tensor) -> None:
        q_THE, k_TKE, v_TKE = new.q, new.k, new.values
        piece, at = self._piece, 0
        for of_band in self._held:
            spans = []
            for row in of_band.rows:
                num_new = piece.stop - max(piece.start, self._cache.start(row))
                spans.append((at, at + num_new))
                at += num_new
            is_packed = of_band.band.shape.packed is not None
            if is_packed and self._cache.is_chunk(piece):
                self._keep_chunk(of_band, k_TKE, v_TKE)
            for first, last, whole in self._runs(of_band.rows, spans):
                begin, end = spans[first][0], spans[last - 1][1]
                count = last - first
                span_q = _rows_first(q_THE[begin:end], count)
                keys = [_rows_first(k_TKE[begin:end], count)]
                values = [_rows_first(v_TKE[begin:end], count)]
                starts, length = None, span_q.shape[2]
                if not whole and is_packed:
                    earlier = self._cache.prompt(of_band)
                    length = piece.stop - self._cache.start(of_band.rows[first])
                    num_earlier = length - span_q.shape[2]
                    keys, values = (
                        [page[:, :, :num_earlier], *own]
                        for page, own in zip(earlier, (keys, values), strict=True)
                    )
                elif not whole:
                    # What earlier pieces brought; where there is no page of it, no token sees it.
                    base = of_band.band.first_column(piece.start)
                    pages = self._cache.pages(of_band, first, last)
                    keys, values = (
                        [*_up_to(each, piece.start - base), *own]
                        for each, own in zip(pages, (keys, values), strict=True)
                    )
                    starts = self._starts(of_band.rows[first:last], base)
                    length = piece.stop - base
                spec = replace(self._attention, length=length, starts=starts, sinks=new.sinks)
                o_NHLE = self._backend.attention(span_q, keys, values, spec)
                out_THE[begin:end].view(count, -1, *q_THE.shape[1:]).copy_(o_NHLE.transpose(1, 2))
            if is_packed:
                if self._cache.is_complete(piece):
                    self._pack_prompt(of_band, spans, k_TKE, v_TKE)
            elif self._keep:
                self._append_prompt(of_band, spans, k_TKE, new.v)

    def _starts(self, rows: Sequence[int], base: int) -> tuple[int, ...] | None:
        """The columns that rows begin in, counted from `base`: 0 for all that began before it."""
        starts = tuple(max(0, self._cache.start(row) - base) for row in rows)
        return starts if any(starts) else None

    def _runs(
        self, rows: Sequence[int], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int, bool]]:
        """Neighbouring rows of equal length, and whether all they attend to is in this piece."""
        runs: list[tuple[int, int, bool]] = []
        for index, row in enumerate(rows):
            num_new = spans[index][1] - spans[index][0]
            whole = self._cache.start(row) >= self._piece.start
            if runs and runs[-1][2] == whole:
                first = runs[-1][0]
                if spans[first][1] - spans[first][0] == num_new:
                    runs[-1] = (first, index + 1, whole)
                    continue
            runs.append((index, index + 1, whole))
        return runs

    def _append_prompt(
        self,
        held: Held,
        spans: Sequence[tuple[int, int]],
        k_TKE: Tensor,
        v_TKE: Tensor | None,
    ) -> None:
        cache, piece, band = self._cache, self._piece, held.band
        base = band.first_column(piece.stop)
        last = piece.stop - base
        while band.num_made < band.num_prompt_pages:
            cache.new_page(band, is_open=False)
        is_first = all(cache.start(row) >= piece.start for row in held.rows)
        first_page = 0
        if not is_first and band.moves:
            keys, values = cache.pages(held, 0, len(held.rows))
            for pages in (keys,) if v_TKE is None else (keys, values):
                _move_up(pages, piece.stop - piece.start)
        elif not is_first:
            first_page = band.page_of(piece.start - base)
        for number in range(first_page, band.page_of(last - 1) + 1):
            keys_NKGE, values_NKGE = cache.changing(held, number)
            low_edge, high_edge = band.edges[number : number + 2]
            for index, (begin, end) in enumerate(spans):
                # The row's tokens end in column `last`; those of this page are in the middle.
                low = min(max(low_edge, last - (end - begin)), high_edge)
                high = min(high_edge, last)
                if is_first:
                    # Masked columns get no weight, but 0 times what lies there must be 0.
                    keys_NKGE[index, :, : low - low_edge] = 0
                    if v_TKE is not None:
                        values_NKGE[index, :, : low - low_edge] = 0
                if low < high:
                    tokens = slice(end - (last - low), end - (last - high))
                    columns = slice(low - low_edge, high - low_edge)
                    # Head by head first: where keys lie feature by feature, a copy that does
                    # both at once is five times slower than the two together.
                    k_KCE = k_TKE[tokens].transpose(0, 1).contiguous()
                    keys_NKGE[index, :, columns] = k_KCE
                    if v_TKE is not None:
                        values_NKGE[index, :, columns] = v_TKE[tokens].transpose(0, 1)

    def _keep_chunk(self, held: Held, k_TKE: Tensor, v_TKE: Tensor) -> None:
        """Put the piece's part of a prompt beside those before it."""
        (row,) = held.rows
        columns = slice(
            max(self._piece.start - self._cache.start(row), 0),
            self._piece.stop - self._cache.start(row),
        )
        for kept_1KLE, x_TKE in zip(self._cache.prompt(held), (k_TKE, v_TKE), strict=True):
            # Head by head first, as above.
            kept_1KLE[0, :, columns] = x_TKE.transpose(0, 1).contiguous()

    def _pack_prompt(
        self, held: Held, spans: Sequence[tuple[int, int]], k_TKE: Tensor, v_TKE: Tensor
    ) -> None:
        """Pack the prompts of the held rows, which are complete; each page goes home at once."""
        cache, band, packed = self._cache, held.band, held.band.shape.packed
        assert packed is not None, "nothing here is packed"
        runs: list[tuple[slice, tuple[Tensor, Tensor]]] = []
        if cache.is_chunk(self._piece):
            runs.append((slice(0, 1), cache.prompt(held)))
        else:
            for first, last, _ in self._runs(held.rows, spans):
                begin, end = spans[first][0], spans[last - 1][1]
                k_nKLE, v_nKLE = (_rows_first(x[begin:end], last - first) for x in (k_TKE, v_TKE))
                runs.append((slice(first, last), (k_nKLE, v_nKLE)))
        if self._keep:
            while band.num_made < band.num_prompt_pages:
                cache.new_page(band, is_open=False)
            for number in range(band.num_prompt_pages):
                low, high = band.edges[number : number + 2]
                planes = cache.changing(held, number)
                for rows, exact in runs:
                    first_column = low - (band.edges[band.num_prompt_pages] - exact[0].shape[2])
                    own = [plane[rows] for plane in planes]
                    pack_prompt_page(packed, exact, own, first_column, high - low)
                cache.send(held, number)
        cache.end_prompt(band)

    # ---- decode

    def _begin(self, step: _Step, kernels: _Attends, new: _New) -> Tensor | None:
        """Append a column, and attend; or choose only, and there is no result yet.

        All of `new` is where the step's pages are.
        """
        band, stop = step.held.band, self._piece.stop
        if len(step.places) < len(band.rows):
            step.index_N = torch.tensor(step.places, device=new.q.device)
            new = new.scattered(step.index_N, len(band.rows))
        self._append_step(step.held, new.k, new.v)
        base = band.base + band.edges[min(step.held.leases)]
        spec = replace(
            self._attention,
            length=stop - base,
            starts=self._starts(band.rows, base),
            sinks=new.sinks,
        )
        if self._sparsity is not None:
            with self._computing(step):
                step.sparse = SparseStep(
                    self._sparsity, self._cache, step.held, new.q, spec, step.places
                )
            return None
        parts = []
        for first, last, keys, values in self._cache.unpacked(step.held):
            starts = None if spec.starts is None else spec.starts[first:last]
            own = replace(spec, starts=starts)
            q_NHLE = new.q[first:last].unsqueeze(2)
            parts.append(kernels.attention(q_NHLE, keys, values, own).squeeze(2))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _put(self, step: _Step, o_NHE: Tensor | None, out_THE: Tensor) -> None:
        """Give the band's live rows what came out for them, if it did."""
        if o_NHE is None:
            return
        if step.index_N is not None:
            o_NHE = o_NHE[step.index_N]
        if step.crossing is None:
            out_THE[step.tokens] = o_NHE
        else:
            assert self._host is not None, "something was sent to a CPU, and there is none"
            self._host.bring(o_NHE, out_THE[step.tokens])

    def _computing(self, step: _Step) -> AbstractContextManager[None]:
        """What is computed in the body is the CPU's, where it attends to the step."""
        if step.crossing is None or self._host is None:
            return nullcontext()
        return self._host.computing("attention")

    def _append_step(self, held: Held, k_NKE: Tensor, v_NKE: Tensor | None) -> None:
        band, column = held.band, self._piece.start - held.band.base
        number = band.page_of(column)
        if number == band.num_made:
            self._cache.new_page(band, is_open=True)
        keys_NKGE, values_NKGE = self._cache.changing(held, number)
        at = column - band.edges[number]
        keys_NKGE[:, :, at] = k_NKE
        if v_NKE is not None:
            values_NKGE[:, :, at] = v_NKE


_ROUNDS = (
    PieceAttention.send,
    PieceAttention.on_device,
    PieceAttention.on_host,
    PieceAttention.ask,
    PieceAttention.take,
    PieceAttention.add_up,
)


def attend_to(pieces: Sequence[PieceAttention]) -> Attend:
    """What the decoder calls for pieces whose tokens lie end to end."""

    def attend(
        q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor | None, sinks_H: Tensor | None
    ) -> Tensor:
        out_THE = q_THE.new_empty(q_THE.shape)
        whole, at, own = _New(q_THE, k_TKE, v_TKE, sinks_H), 0, []
        for piece in pieces:
            tokens = slice(at, at + piece.num_tokens)
            own.append((piece, whole.of(tokens), out_THE[tokens]))
            at = tokens.stop
        for take_turns in _ROUNDS:
            for piece, new, out in own:
                take_turns(piece, new, out)
        return out_THE

    return attend


def common_to_rows(attention: Attention | LatentAttention) -> AttentionSpec:
    """What all rows of a layer have in common; its length is for whoever attends to fill in."""
    return AttentionSpec(
        length=0,
        scale=attention.scale,
        window=attention.window,
        soft_cap=attention.soft_cap,
        slopes=attention.slopes,
    )


def _steps(live: Sequence[int], held: HeldBands) -> list[_Step]:
    """The decode steps of bands that have live rows."""
    token_of = {row: token for token, row in enumerate(live)}
    steps = []
    for of_band in held:
        rows = of_band.band.rows
        places = [index for index, row in enumerate(rows) if row in token_of]
        if places:
            begin = token_of[rows[places[0]]]
            steps.append(_Step(of_band, slice(begin, begin + len(places)), places))
    return steps


def _rows_first(x_THE: Tensor, num_rows: int) -> Tensor:
    """Tokens of rows of equal length as (N, H, L, E); a view."""
    return x_THE.view(num_rows, -1, *x_THE.shape[1:]).transpose(1, 2)


def _up_to(pages_NKGE: Sequence[Tensor], num_columns: int) -> list[Tensor]:
    """The first columns of pages."""
    return [page[:, :, seen] for page, _, seen in seen_pages(pages_NKGE, slice(0, num_columns))]


def _move_up(pages_NKGE: Sequence[Tensor], num_columns: int) -> None:
    """The first columns of pages go, and the others take their place; the last are as they were."""
    for number, page_NKGE in enumerate(pages_NKGE):
        coming = slice(num_columns, num_columns + page_NKGE.shape[2])
        parts = [page[:, :, seen] for page, _, seen in seen_pages(pages_NKGE[number:], coming)]
        if parts:
            moved_NKGE = torch.cat(parts, 2)  # a copy: a page may lose less than it keeps
            page_NKGE[:, :, : moved_NKGE.shape[2]] = moved_NKGE


def _scatter(x_NHE: Tensor, index_N: Tensor, num_rows: int) -> Tensor:
    out_NHE = x_NHE.new_zeros(num_rows, *x_NHE.shape[1:])
    return out_NHE.index_copy_(0, index_N, x_NHE)

"""Laws of `attention`: every option alone and with the others, however the cache lies.

Dimension key: N rows, H query heads, K key/value heads, L new tokens a row, G columns of a page,
B bytes, E features of a head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexport.backend import AttentionSpec, Backend
from flexport.engine.pages import PageShape
from flexport.testing.conformance.problems import AttentionCase, AttentionProblem
from flexport.testing.conformance.tensors import dtypes_of, on_host, placed, placed_keys
from flexport.torch_ops import as_tensor

__all__ = ["ATTENTION_CASES", "AttentionLaws"]

ATTENTION_CASES = {
    "one column": AttentionCase(pages=(8,), length=1),
    "a full page": AttentionCase(pages=(16,), length=16),
    "a page with room": AttentionCase(pages=(64,), length=9),
    "three pages": AttentionCase(pages=(16, 16, 16), length=37),
    "pages of many sizes": AttentionCase(pages=(3, 40, 7, 64), length=101),
    "a page not reached yet": AttentionCase(pages=(16, 16), length=16),
    "rows that start late": AttentionCase(pages=(16, 16), length=21, rows=3, starts=(0, 20, 17)),
    "one row": AttentionCase(pages=(32,), length=30, rows=1, starts=(5,)),
    "two queries a key": AttentionCase(pages=(16, 16), length=27, heads=(6, 3)),
    "eight queries a key": AttentionCase(pages=(16, 16), length=27, heads=(8, 1), starts=(3, 0)),
    "long": AttentionCase(pages=(64,) * 12, length=721, rows=1, head_dim=64),
    "odd head": AttentionCase(pages=(16,), length=11, head_dim=20),
    "a prompt": AttentionCase(pages=(40,), length=40, queries=40),
    "a prompt over pages": AttentionCase(pages=(16, 16, 16), length=41, queries=41, rows=1),
    "a long prompt": AttentionCase(pages=(300,), length=300, queries=300, rows=1, head_dim=64),
    "a chunk that continues": AttentionCase(pages=(16, 16, 16), length=45, queries=20),
    "a short chunk that continues": AttentionCase(pages=(16, 16, 16), length=45, queries=3),
    "a ragged chunk": AttentionCase(
        pages=(16, 16, 16), length=45, queries=20, rows=3, starts=(0, 25, 7)
    ),
    "a grouped chunk": AttentionCase(
        pages=(16, 32), length=45, queries=17, heads=(8, 2), starts=(4, 0)
    ),
    "a chunk of a row that starts late": AttentionCase(
        pages=(48,), length=45, queries=20, rows=1, starts=(7,)
    ),
    "rows that start late together": AttentionCase(
        pages=(48,), length=45, queries=33, starts=(9, 9), heads=(6, 3)
    ),
    "a prompt with an odd head": AttentionCase(pages=(40,), length=40, queries=40, head_dim=24),
    "not causal": AttentionCase(pages=(16, 16), length=25, queries=25, causal=False),
    "window": AttentionCase(pages=(16, 16, 16), length=41, window=9),
    "window of one": AttentionCase(pages=(16,), length=12, window=1),
    "window wider than the cache": AttentionCase(pages=(16,), length=12, window=50),
    "window over a prompt": AttentionCase(pages=(100,), length=100, queries=100, window=7),
    "window over a chunk": AttentionCase(
        pages=(16, 16, 16), length=45, queries=20, window=11, starts=(2, 20)
    ),
    "window over a long prompt": AttentionCase(
        pages=(300,), length=300, queries=300, rows=1, window=140
    ),
    "soft-cap": AttentionCase(pages=(16, 16), length=20, soft_cap=3.0),
    "soft-cap over a prompt": AttentionCase(pages=(33,), length=33, queries=33, soft_cap=3.0),
    "slopes": AttentionCase(pages=(16, 16), length=20, slopes=(0.5, 0.25, 0.125, 0.0)),
    "slopes over a ragged chunk": AttentionCase(
        pages=(16, 16), length=20, queries=6, slopes=(0.5, 0.25, 0.125, 1.0), starts=(14, 2)
    ),
    "sinks": AttentionCase(pages=(16, 16), length=20, sinks=True, heads=(4, 2)),
    "sinks over a prompt": AttentionCase(pages=(32,), length=32, queries=32, sinks=True),
    "everything": AttentionCase(
        pages=(16, 16, 16),
        length=45,
        queries=20,
        heads=(4, 2),
        starts=(5, 25),
        window=13,
        soft_cap=4.0,
        slopes=(0.5, 0.25, 0.125, 0.0),
        sinks=True,
    ),
    "one column of its own": AttentionCase(pages=(16, 8), length=19, starts=(18, 0)),
    "a chunk that is all of a row": AttentionCase(
        pages=(16, 16), length=30, queries=9, rows=3, starts=(21, 0, 20)
    ),
    "a chunk that is not causal": AttentionCase(
        pages=(16, 16), length=25, queries=7, causal=False, starts=(3, 18)
    ),
    "window and rows that start late": AttentionCase(
        pages=(16, 16), length=29, rows=3, window=6, starts=(28, 0, 24)
    ),
    "window over a ragged chunk": AttentionCase(
        pages=(48,), length=45, queries=17, rows=3, window=5, starts=(28, 0, 25)
    ),
    "forty pages of many sizes": AttentionCase(
        pages=tuple(1 + number * 7 % 11 for number in range(40)), length=187, starts=(100, 0)
    ),
    "a chunk over forty pages": AttentionCase(
        pages=tuple(1 + number * 5 % 7 for number in range(40)), length=130, queries=40
    ),
    "pages of one column": AttentionCase(pages=(1,) * 9, length=8, queries=3),
    "a head of one": AttentionCase(pages=(16,), length=11, head_dim=1),
    "a head of 80": AttentionCase(pages=(16, 16), length=27, head_dim=80),
    "a head of 96": AttentionCase(pages=(16, 16), length=27, head_dim=96, heads=(4, 2)),
    "a head of 128": AttentionCase(pages=(16, 16), length=27, head_dim=128, queries=19),
    "a head of 256": AttentionCase(pages=(16, 16), length=27, head_dim=256, queries=3),
    "71 heads of one key": AttentionCase(pages=(16, 16), length=27, heads=(71, 1)),
    "many rows": AttentionCase(pages=(16, 16), length=27, rows=33, starts=(*range(27), *[0] * 6)),
}


@st.composite
def attention_cases(draw: st.DrawFn) -> AttentionCase:
    """Any case that is small."""
    pages = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=6)))
    length = draw(st.integers(1, sum(pages)))
    queries = draw(st.integers(1, length))
    rows, num_kv_heads, group = (draw(st.integers(1, 3)) for _ in range(3))
    num_heads = num_kv_heads * group
    return AttentionCase(
        pages=pages,
        length=length,
        queries=queries,
        rows=rows,
        heads=(num_heads, num_kv_heads),
        head_dim=draw(st.sampled_from([1, 4, 7, 8, 16, 40])),
        starts=draw(st.none() | st.tuples(*[st.integers(0, length - queries)] * rows)),
        causal=draw(st.booleans()),
        window=draw(st.none() | st.integers(1, length + 1)),
        soft_cap=draw(st.none() | st.sampled_from([0.5, 3.0, 30.0])),
        slopes=draw(st.none() | st.tuples(*[st.sampled_from([0.0, 0.125, 1.0])] * num_heads)),
        sinks=draw(st.booleans()),
    )


class AttentionLaws:
    """Softmax attention over pages, as `attention_in_float64` has it."""

    @pytest.mark.parametrize("case", ATTENTION_CASES.values(), ids=ATTENTION_CASES.keys())
    def test_attention_is_accurate_and_reads_nothing_past_the_length(
        self, backend: Backend, case: AttentionCase
    ) -> None:
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(case, dtype)

            problem.check(on_host(backend, problem.run(backend)))

    # Many subclasses run this with a backend each, and no example leaves anything in it.
    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            HealthCheck.differing_executors,
            HealthCheck.function_scoped_fixture,
            HealthCheck.too_slow,
        ],
    )
    @given(case=attention_cases(), seed=st.integers(0, 99), by_feature=st.booleans())
    def test_any_attention_is_accurate(
        self, backend: Backend, case: AttentionCase, seed: int, by_feature: bool
    ) -> None:
        dtypes = dtypes_of(backend)
        problem = AttentionProblem.draw(case, dtypes[seed % len(dtypes)], seed=seed)

        problem.check(on_host(backend, problem.run(backend, by_feature=by_feature)))

    @pytest.mark.parametrize("by_feature", [False, True], ids=["by column", "by feature"])
    def test_attention_takes_keys_in_either_order(self, backend: Backend, by_feature: bool) -> None:
        """A prompt that is all new comes as the projection left it, whatever pages look like."""
        for dtype in dtypes_of(backend):
            for name in ("three pages", "a ragged chunk", "eight queries a key", "a prompt"):
                problem = AttentionProblem.draw(ATTENTION_CASES[name], dtype)

                problem.check(on_host(backend, problem.run(backend, by_feature=by_feature)))

    def test_attention_takes_pages_as_the_cache_lays_them_out(self, backend: Backend) -> None:
        """Views of bytes, with a gap of NaN behind every row, of which only some are asked for."""
        by_feature = backend.capabilities.keys_by_feature
        case = AttentionCase(
            pages=(24, 16, 16), length=43, queries=5, rows=4, heads=(6, 3), starts=(0, 38, 5, 20)
        )
        held = slice(1, 3)
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(case, dtype)
            q_NHLE, _, _, spec = problem.on_device(backend)
            cache = PageShape(
                num_kv_heads=3,
                head_dim=case.head_dim,
                num_planes=2,
                keys_by_feature=by_feature,
                dtype=dtype,
            )
            pages = []
            for keys_NKGE, values_NKGE in zip(problem.keys, problem.values, strict=True):
                width = keys_NKGE.shape[2]
                num_bytes = cache.page_bytes(case.rows, width)
                bytes_B = torch.full((num_bytes,), 0xFF, dtype=torch.uint8)
                for view, values in zip(
                    cache.views(bytes_B, case.rows, width), (keys_NKGE, values_NKGE), strict=True
                ):
                    view.copy_(values)
                pages.append(cache.views(placed(backend, bytes_B), case.rows, width))
            assert spec.starts is not None

            out_NHLE = backend.attention(
                q_NHLE[held],
                [keys[held] for keys, _ in pages],
                [values[held] for _, values in pages],
                replace(spec, starts=spec.starts[held]),
            )

            AttentionProblem(
                q_NHLE=problem.q_NHLE[held],
                keys=[page[held] for page in problem.keys],
                values=[page[held] for page in problem.values],
                spec=replace(problem.spec, starts=spec.starts[held]),
            ).check(on_host(backend, out_NHLE))

    @pytest.mark.parametrize("window", [None, 20])
    @pytest.mark.parametrize("queries", [3, 20])
    def test_attention_takes_a_chunk_behind_parts_of_pages(
        self, backend: Backend, queries: int, window: int | None
    ) -> None:
        """What a chunk brings comes as the projection left it, behind pages of earlier columns."""
        case = AttentionCase(
            pages=(16, 9, queries),
            length=25 + queries,
            queries=queries,
            rows=1,
            heads=(6, 3),
            starts=(4,),
            window=window,
        )
        by_feature = backend.capabilities.keys_by_feature
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(case, dtype)
            q_NHLE, _, _, spec = problem.on_device(backend)
            keys, values = (
                [
                    placed_keys(backend, whole, order),
                    placed_keys(backend, torch.nn.functional.pad(part, (0, 0, 0, 7)), order)[
                        :, :, :9
                    ],
                    placed(backend, new.transpose(1, 2)).transpose(1, 2),
                ]
                for (whole, part, new), order in (
                    (problem.keys, by_feature),
                    (problem.values, False),
                )
            )

            problem.check(on_host(backend, backend.attention(q_NHLE, keys, values, spec)))

    @pytest.mark.parametrize("num_rows", [1, 3])
    def test_attention_takes_parts_of_one_projection(self, backend: Backend, num_rows: int) -> None:
        """Queries, keys and values lie side by side, token by token: no page was written yet."""
        case = AttentionCase(pages=(21,), length=21, queries=21, rows=num_rows, heads=(6, 2))
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(case, dtype)
            parts = [problem.q_NHLE, *problem.keys, *problem.values]
            fused_NLHE = placed(backend, torch.cat(parts, dim=1).transpose(1, 2).contiguous())
            q_NHLE, keys, values = fused_NLHE.transpose(1, 2).split([6, 2, 2], dim=1)

            out_NHLE = backend.attention(q_NHLE, [keys], [values], problem.spec)

            problem.check(on_host(backend, out_NHLE))

    def test_attention_takes_queries_head_by_head(self, backend: Backend) -> None:
        problem = AttentionProblem.draw(ATTENTION_CASES["a ragged chunk"])
        _, keys, values, spec = problem.on_device(backend)

        out_NHLE = backend.attention(
            placed(backend, problem.q_NHLE.contiguous()), keys, values, spec
        )

        problem.check(on_host(backend, out_NHLE))

    def test_attention_takes_pages_that_begin_anywhere(self, backend: Backend) -> None:
        """A page is aligned to its items, and to nothing more."""
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(ATTENTION_CASES["three pages"], dtype)
            q_NHLE, keys, values, spec = problem.on_device(backend, by_feature=False)
            for pages in (keys, values):
                for number, page in enumerate(pages):
                    num_bytes = page.numel() * page.element_size()
                    bytes_B = backend.allocate((num_bytes + 64,), torch.uint8)
                    shifted = as_tensor(bytes_B, (number + 1) * dtype.itemsize, page.shape, dtype)
                    backend.copy_async(page, shifted).wait()
                    pages[number] = shifted

            problem.check(on_host(backend, backend.attention(q_NHLE, keys, values, spec)))

    @pytest.mark.parametrize("scale", [0.3, 1.0, 2.0, 1e-3])
    def test_attention_takes_any_scale(self, backend: Backend, scale: float) -> None:
        for queries in (1, 20):
            case = AttentionCase(pages=(16, 16), length=20, queries=queries, head_dim=24)
            problem = AttentionProblem.draw(case, scale=scale)

            problem.check(on_host(backend, problem.run(backend)))

    @pytest.mark.parametrize("queries", [1, 5, 40])
    def test_equal_keys_share_the_weight_equally(self, backend: Backend, queries: int) -> None:
        case = AttentionCase(pages=(16, 16, 16), length=40, queries=queries, causal=False)
        for dtype in dtypes_of(backend):
            problem = AttentionProblem.draw(case, dtype)
            for page in problem.keys:
                page.copy_(torch.ones_like(page))

            out_NHLE = on_host(backend, problem.run(backend))

            problem.check(out_NHLE)
            mean_NK1E = torch.cat(problem.values, 2)[:, :, :40].double().mean(2, keepdim=True)
            unit = torch.finfo(dtype).eps
            assert float((out_NHLE.double() - mean_NK1E).abs().max()) <= 8 * unit + 1e-5

    @pytest.mark.parametrize("queries", [1, 5, 40])
    @pytest.mark.parametrize("size", [1e2, 1e4])
    def test_large_scores_do_not_overflow(
        self, backend: Backend, size: float, queries: int
    ) -> None:
        """One column has by far the largest score, or all have very low ones: exp knows no such."""
        case = AttentionCase(pages=(16, 16, 16), length=40, queries=queries)
        for dtype in dtypes_of(backend):
            for sign in (1, -1):
                problem = AttentionProblem.draw(case, dtype, scale=1.0)
                problem.q_NHLE.fill_(size**0.5 / 4)
                for page in problem.keys:
                    page.fill_(sign * size**0.5 / 4)
                # Sixteen products of these are the score; the first column's is twice as large.
                problem.keys[0][:, :, 0].mul_(2)

                out_NHLE = on_host(backend, problem.run(backend))

                assert bool(out_NHLE.isfinite().all())
                if sign > 0:
                    first_NH1E = problem.values[0][:, :, :1]
                    assert torch.equal(out_NHLE, first_NH1E.expand(out_NHLE.shape))
                else:
                    problem.check(out_NHLE)

    def test_large_scores_of_both_signs_are_accurate(self, backend: Backend) -> None:
        for queries in (1, 40):
            case = AttentionCase(pages=(16, 16, 16), length=40, queries=queries)
            problem = AttentionProblem.draw(case, scale=1e3)

            problem.check(on_host(backend, problem.run(backend)))

    def test_a_soft_cap_tames_large_scores(self, backend: Backend) -> None:
        case = AttentionCase(pages=(16, 16), length=20, queries=3, soft_cap=5.0)
        problem = AttentionProblem.draw(case, scale=1e3)

        problem.check(on_host(backend, problem.run(backend)))

    def test_attention_leaves_its_arguments_as_they_were(self, backend: Backend) -> None:
        for by_feature in (False, True):
            problem = AttentionProblem.draw(ATTENTION_CASES["everything"])
            arguments = problem.on_device(backend, by_feature=by_feature)
            q_NHLE, keys, values, spec = arguments
            assert spec.sinks is not None and problem.spec.sinks is not None

            backend.attention(*arguments)

            for tensor, before in zip(
                [q_NHLE, *keys, *values, spec.sinks],
                [problem.q_NHLE, *problem.keys, *problem.values, problem.spec.sinks],
                strict=True,
            ):
                after = on_host(backend, tensor)
                assert torch.equal(after.nan_to_num(7.0), before.nan_to_num(7.0))

    @pytest.mark.parametrize("name", ["three pages", "a ragged chunk", "a prompt", "everything"])
    def test_every_attention_has_memory_of_its_own(self, backend: Backend, name: str) -> None:
        for dtype in dtypes_of(backend):
            problems = [
                AttentionProblem.draw(ATTENTION_CASES[name], dtype, seed=n) for n in range(4)
            ]

            results = [problem.run(backend) for problem in problems]
            for problem, out_NHLE in zip(problems, results, strict=True):
                problem.check(on_host(backend, out_NHLE))

            results[0].fill_(math.nan)
            problems[1].check(on_host(backend, results[1]))
            problems[0].check(on_host(backend, problems[0].run(backend)))

    def test_an_attention_takes_the_cache_as_it_is_when_it_is_issued(
        self, backend: Backend
    ) -> None:
        """As decoding goes: a step, the next column is written, a step, the page is used anew."""
        problem = AttentionProblem.draw(ATTENTION_CASES["three pages"])
        q_NHLE, keys, values, spec = problem.on_device(backend)
        newest = spec.length - 1 - 32  # the place of the newest column in the last page
        columns = [page[:, :, newest] * 1 for page in (keys[-1], values[-1])]
        for page in (keys[-1], values[-1]):
            page[:, :, newest] = math.nan

        backend.attention(q_NHLE, keys, values, replace(spec, length=spec.length - 1))
        for page, column in zip((keys[-1], values[-1]), columns, strict=True):
            page[:, :, newest] = column
        out_NHLE = backend.attention(q_NHLE, keys, values, spec)
        for page in (*keys, *values):
            page.fill_(math.nan)
        q_NHLE.zero_()

        problem.check(on_host(backend, out_NHLE))

    def test_a_rows_attention_does_not_depend_on_its_neighbours(self, backend: Backend) -> None:
        case = AttentionCase(pages=(16, 16), length=21, rows=3, starts=(0, 20, 9))
        problem = AttentionProblem.draw(case)
        q_NHLE, keys, values, spec = problem.on_device(backend)

        together = on_host(backend, backend.attention(q_NHLE, keys, values, spec))

        assert spec.starts is not None
        for row, start in enumerate(spec.starts):
            only = slice(row, row + 1)
            alone_spec = AttentionSpec(length=spec.length, scale=spec.scale, starts=(start,))
            alone = backend.attention(
                q_NHLE[only], [p[only] for p in keys], [p[only] for p in values], alone_spec
            )
            difference = (together[only] - on_host(backend, alone)).abs().max()
            assert float(difference) <= 1e-5

    @pytest.mark.parametrize("queries", [1, 6, 21])
    @pytest.mark.parametrize("where", ["queries", "keys", "values"])
    def test_a_row_of_the_cache_that_is_not_finite_spoils_itself_alone(
        self, backend: Backend, where: str, queries: int
    ) -> None:
        case = AttentionCase(pages=(16, 16), length=21, queries=queries, rows=3, heads=(4, 2))
        problem = AttentionProblem.draw(case)
        q_NHLE, keys, values, spec = problem.on_device(backend)
        spoiled = {"queries": q_NHLE, "keys": keys[0], "values": values[0]}[where]
        spoiled[1] = math.nan

        out_NHLE = on_host(backend, backend.attention(q_NHLE, keys, values, spec))

        assert bool(out_NHLE[1].isnan().all())
        others = [0, 2]
        AttentionProblem(
            q_NHLE=problem.q_NHLE[others],
            keys=[page[others] for page in problem.keys],
            values=[page[others] for page in problem.values],
            spec=spec,
        ).check(out_NHLE[others])

"""Laws of the verbs together: many threads, inference mode, plain torch beside them, the end."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from flexport.backend import AttentionSpec, Backend
from flexport.testing.conformance.problems import AttentionCase, AttentionProblem, Product
from flexport.testing.conformance.tensors import (
    PLACES,
    SOME_TEXT,
    Place,
    in_threads,
    on_host,
    placed,
    some,
)

__all__ = ["WholeLaws"]

CHUNK = AttentionCase(pages=(48,), length=45, queries=33, starts=(9, 9), heads=(6, 3))

STEP = AttentionCase(pages=(16, 16), length=27, heads=(6, 3))

PLAIN_TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "arithmetic": lambda x: (x * 2 + 1 - x / 3).abs().sqrt(),
    "in place": lambda x: x.clone().mul_(3).add_(x).clamp_(min=-1),
    "layer norm": lambda x: functional.layer_norm(x, (12,), x[0], x[1], 1e-5),
    "mean square": lambda x: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),
    "relu": lambda x: torch.relu_(x.clone()),
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(-1),
    "log-softmax": lambda x: x.log_softmax(-1),
    "dtypes": lambda x: x.to(torch.bfloat16).float(),
    "rows by number": lambda x: x[torch.tensor([3, 0, 3], device=x.device)],
    "rows into place": lambda x: torch.zeros_like(x).index_copy_(
        0, torch.tensor([4, 2], device=x.device), x[:2]
    ),
    "a column into place": lambda x: _with_column(x, x[:, 3]),
    "a part into place": lambda x: _with_part(x, x[1:3]),
    "cat": lambda x: torch.cat([x, x[:2]], dim=0),
    "transposed and made contiguous": lambda x: x.T.contiguous(),
    "heads": lambda x: x.view(6, 3, 4).transpose(0, 1).reshape(3, 24),
    "where": lambda x: torch.where(x > 0, x, x * 0.5),
    "a mask": lambda x: x.masked_fill(x < 0, -torch.inf).exp(),
    "the largest": lambda x: x.amax(-1, keepdim=True),
    "its place": lambda x: x.argmax(-1).float(),
    "the k largest": lambda x: x.topk(3, dim=-1).values,
    "running sums": lambda x: x.cumsum(-1),
    "gather": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)),
    "fresh memory": lambda x: torch.empty_like(x).copy_(x),
}
"""What the core does with device tensors, beside the verbs: norms, activations, the cache's
columns, sampling."""


def _with_column(x: Tensor, column: Tensor) -> Tensor:
    changed = x.clone()
    changed[:, 1] = column
    return changed


def _with_part(x: Tensor, part: Tensor) -> Tensor:
    changed = x.clone()
    changed[3:5].copy_(part)
    return changed


class WholeLaws:
    """A backend from its opening to its end."""

    @pytest.mark.parametrize("inference", [False, True], ids=["", "inference"])
    @pytest.mark.parametrize("operate", PLAIN_TORCH.values(), ids=PLAIN_TORCH.keys())
    def test_plain_torch_works_on_device_tensors(
        self, backend: Backend, operate: Callable[[Tensor], Tensor], inference: bool
    ) -> None:
        data = some((6, 12), torch.float32)

        with torch.inference_mode(inference):
            expected = operate(data.clone())
            there = placed(backend, data)
            found = operate(there)

        assert found.device == there.device
        assert torch.allclose(on_host(backend, found), expected, rtol=1e-4, atol=1e-5)

    def test_plain_torch_and_kernels_keep_their_order(self, backend: Backend) -> None:
        x_TD = placed(backend, torch.ones(64, 64))
        half_DD = placed(backend, torch.eye(64) * 0.5)

        for _ in range(40):
            x_TD = backend.matmul(x_TD + 1, half_DD)

        assert set(on_host(backend, x_TD).flatten().tolist()) == {1.0}

    def test_verbs_may_be_called_from_many_threads(self, backend: Backend) -> None:
        def work(seed: int) -> None:
            for number in range(5):
                product = Product.draw((9, 32, 17), torch.float32, with_bias=True, seed=seed)
                product.check(on_host(backend, product.run(backend)))
                case = (STEP, CHUNK)[number % 2]
                attention = AttentionProblem.draw(case, seed=seed + number)
                attention.check(on_host(backend, attention.run(backend)))

        in_threads(work)

    def test_results_of_one_thread_are_read_in_another(self, backend: Backend) -> None:
        products = [
            Product.draw((9, 32, 17), torch.float32, with_bias=True, seed=n) for n in range(4)
        ]
        results: dict[int, Tensor] = {}

        def compute(number: int) -> None:
            results[number] = products[number].run(backend)

        in_threads(compute)
        for number, out_TF in results.items():
            products[number].check(on_host(backend, out_TF))

    def test_kernels_work_in_inference_mode_and_then_outside_it(self, backend: Backend) -> None:
        product = Product.draw((9, 32, 17), torch.float32, with_bias=True)
        attention = AttentionProblem.draw(CHUNK)

        def work(_: int) -> None:
            # In a thread of its own, which has met no kernel before.
            for inference in (True, False):
                with torch.inference_mode(inference):
                    out_TF = product.run(backend)
                    out_NHLE = attention.run(backend)
                product.check(on_host(backend, out_TF))
                attention.check(on_host(backend, out_NHLE))

        in_threads(work)

    def test_close_may_be_called_twice_and_ends_the_other_verbs(self, backend: Backend) -> None:
        x = placed(backend, torch.ones(2, 2))
        page = placed(backend, torch.ones(1, 1, 2, 2))
        host = placed(backend, torch.ones(2, 2), "host")
        verbs: dict[str, Callable[[], object]] = {
            "allocate on the device": lambda: backend.allocate((1,), torch.float32),
            "allocate on the host": lambda: backend.allocate((1,), torch.float32, "host"),
            "copy_async": lambda: backend.copy_async(host, x),
            "matmul": lambda: backend.matmul(x, x),
            "attention": lambda: backend.attention(
                page, [page], [page], AttentionSpec(length=2, scale=1.0)
            ),
            "sync": backend.sync,
        }

        backend.close()
        backend.close()

        for call in verbs.values():
            with pytest.raises(Exception, match=SOME_TEXT):
                call()

    @pytest.mark.parametrize("where", PLACES)
    def test_close_ends_well_with_copies_under_way(self, backend: Backend, where: Place) -> None:
        other: Place = "host" if where == "device" else "device"
        sources = [placed(backend, some((1 << 16,), torch.float32), where) for _ in range(16)]
        tickets = [
            backend.copy_async(source, backend.allocate(source.shape, source.dtype, other))
            for source in sources
        ]

        backend.close()

        # What outlives the backend may be dropped in any order.
        del sources
        gc.collect()
        del tickets
        gc.collect()

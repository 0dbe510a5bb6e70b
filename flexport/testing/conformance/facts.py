"""Laws of `capabilities`: what a device says of itself stays as it was said, and is true."""

from __future__ import annotations

import dataclasses
import pickle

import pytest
import torch

from flexport.backend import Backend
from flexport.testing.conformance.problems import AttentionCase, AttentionProblem, Product
from flexport.testing.conformance.tensors import on_host
from flexport.torch_ops import torch_dtype

__all__ = ["FactLaws"]


class FactLaws:
    """What the core plans with has to be so."""

    def test_capabilities_are_plain_facts_that_do_not_change(self, backend: Backend) -> None:
        facts = backend.capabilities

        assert facts == backend.capabilities
        assert facts.name
        assert facts.memory_bytes > 0
        assert 1 <= facts.page_tokens <= 4096
        assert facts.dtype_reason
        assert facts.dtypes
        assert set(facts.dtypes) <= {"float32", "bfloat16", "float16"}
        assert len(set(facts.dtypes)) == len(facts.dtypes)

    def test_capabilities_do_not_change_with_what_is_done(self, backend: Backend) -> None:
        before = backend.capabilities

        held = backend.allocate((1 << 20,), torch.uint8)
        Product.draw((3, 4, 5), torch.float32).run(backend)
        backend.sync()

        assert backend.capabilities == before
        assert held.numel() == 1 << 20

    def test_capabilities_can_be_written_to_a_report_and_be_a_key(self, backend: Backend) -> None:
        facts = backend.capabilities

        assert pickle.loads(pickle.dumps(facts)) == facts  # noqa: S301 - our own bytes
        assert hash(facts) == hash(dataclasses.replace(facts))
        with pytest.raises(dataclasses.FrozenInstanceError):
            facts.name = "another"  # type: ignore[misc]  # that is the point

    def test_only_a_device_that_shares_the_hosts_tensors_is_addressable(
        self, backend: Backend
    ) -> None:
        device = backend.allocate((4,), torch.float32)

        assert not backend.capabilities.addressable or device.device.type == "cpu"

    def test_every_dtype_that_is_listed_computes(self, backend: Backend) -> None:
        case = AttentionCase(pages=(8, 8), length=13, queries=3, heads=(4, 2))
        for name in backend.capabilities.dtypes:
            product = Product.draw((7, 32, 9), torch_dtype(name), with_bias=True)
            attention = AttentionProblem.draw(case, torch_dtype(name))

            product.check(on_host(backend, product.run(backend)))
            attention.check(on_host(backend, attention.run(backend)))

    def test_pages_of_the_width_it_likes_best_are_taken(self, backend: Backend) -> None:
        width = backend.capabilities.page_tokens
        for pages, length in (((width,), width), ((width,) * 3, 2 * width + 1)):
            problem = AttentionProblem.draw(AttentionCase(pages=pages, length=length, rows=1))

            problem.check(on_host(backend, problem.run(backend)))

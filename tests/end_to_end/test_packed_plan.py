"""A plan asks the backend about packed matrices by the names that the run will use."""

from __future__ import annotations

import pytest
from flexport_cpu.backend import CpuBackend

from flexport.engine.engine import Engine
from flexport.policy import Policy
from flexport.records import Request, SamplingParams


class Multiplies(CpuBackend):
    """Multiplies with one form of packed matrices, however many tokens there are."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def multiplies(self, form, dtype, num_tokens):
        return form == self.form


class Planned(Exception):
    """The plan is made, and nothing more is wanted."""


def planned_bytes(codec, backend, offload_dir):
    """Device memory that is set aside for what computing a row leaves, decoded matrices included."""

    def stop(plan):
        raise Planned(plan)

    row = Request(request_id="r", token_ids=(5,), sampling=SamplingParams(max_tokens=1))
    with (
        Engine(
            model="facebook/opt-125m",
            load_format="dummy",
            backend=backend,
            dtype="float32",
            policy=Policy(compress_weights=codec),
            offload_dir=offload_dir,
            on_plan=stop,
        ) as engine,
        pytest.raises(Planned) as planned,
    ):
        list(engine.generate([row]))
    (plan,) = planned.value.args
    return plan.needs.behind_bytes[0]


@pytest.mark.parametrize(
    ("codec", "form"), [("int8", "int8"), ("int4", "int4"), ("int4:32", "int4")]
)
def test_no_memory_is_set_aside_for_decoding_what_is_never_decoded(codec, form, tmp_path):
    other = {"int8": "int4", "int4": "int8"}[form]

    never, always = (
        planned_bytes(codec, Multiplies(multiplied), tmp_path) for multiplied in (form, other)
    )

    layer_bytes = 12 * 768 * 768 * 4  # six matrices of opt-125m, in float32
    assert always - never == pytest.approx(layer_bytes, rel=0.01)

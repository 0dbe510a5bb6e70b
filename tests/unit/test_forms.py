"""Each published form decodes to the numbers that it stands for, whatever it is cut into.

The encoders (`packers`) are the references: they are written from the forms' own definitions, value by
value.

Dimension key: R rows, D features.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from packers import PACKERS, Packed
from torch import Tensor

from flexport.codecs import groups
from flexport.codecs.layout import Format, Layout
from flexport.codecs.published import formats_of
from flexport.records import FileTensor

NAME = "model.layers.0.mlp.up_proj.weight"

SHAPES = {
    "even": (32, 64),
    # No multiple of a group, of a word or of a block. GPTQ and AWQ keep features out in words.
    "uneven": (24, 44),
}


def found(packer_name: str, packed: Packed) -> tuple[Format, Layout]:
    """How the matrix lies, by its config and the names and shapes of its tensors."""
    files = {
        name: FileTensor(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            path=Path("nowhere"),
            offset_bytes=0,
            num_bytes=tensor.nbytes,
        )
        for name, tensor in packed.tensors.items()
    }
    shape = (packed.plain_FD.shape[0], packed.plain_FD.shape[1])
    for form in formats_of({"quantization_config": PACKERS[packer_name].config}):
        layout = form.layout(NAME, shape, files)
        if layout is not None:
            for part in layout.parts:
                assert files[part.name].shape == part.shape
                assert part.dtypes is None or files[part.name].dtype in part.dtypes
            return form, layout
    raise AssertionError("no form")


def decoded(
    form: Format, layout: Layout, packed: Packed, begin: int, end: int, dtype: torch.dtype
) -> Tensor:
    parts = []
    for part in layout.parts:
        first, last = part.lines(begin, end)
        tensor = packed.tensors[part.name]
        parts.append(tensor.reshape(1)[first:last] if part.shape == () else tensor[first:last])
    return form.decode(parts, torch.empty(end - begin, layout.shape[1], dtype=dtype), begin)


def values(kind: str) -> Tensor:
    values_FD = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(0))
    values_FD[0] = values_FD[0].abs()  # its zeros are 0, which GPTQ stores as the largest number
    return values_FD


PACKED = {
    (name, kind): packer.pack(NAME, values(kind))
    for name, packer in PACKERS.items()
    for kind in SHAPES
    if SHAPES[kind][1] % packer.multiple == 0
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "kind"), PACKED)
def test_numbers_are_what_the_forms_definition_says(name, kind, dtype):
    packed = PACKED[name, kind]
    form, layout = found(name, packed)

    out_RD = decoded(form, layout, packed, 0, layout.shape[0], dtype)

    expected_RD = packed.plain_FD.T if layout.transposed else packed.plain_FD
    assert torch.equal(out_RD, expected_RD.to(dtype))


@given(
    key=st.sampled_from(list(PACKED)),
    at_once=st.integers(1, 4000),
    data=st.data(),
)
def test_any_cut_decodes_as_in_the_whole(key, at_once, data):
    packed = PACKED[key]
    form, layout = found(key[0], packed)
    num_rows, step = layout.shape[0], layout.rows_per_cut
    places = sorted({*range(0, num_rows, step), num_rows})
    begin = data.draw(st.sampled_from(places[:-1]))
    end = data.draw(st.sampled_from([place for place in places if place > begin]))
    whole_RD = decoded(form, layout, packed, 0, num_rows, torch.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_AT_ONCE", at_once)
        part_RD = decoded(form, layout, packed, begin, end, torch.float32)

    assert torch.equal(part_RD, whole_RD[begin:end])


@pytest.mark.parametrize("name", PACKERS)
def test_bytes_belong_to_the_rows_that_need_them(name):
    packed = PACKED[name, "even"]
    _, layout = found(name, packed)

    num_rows, step = layout.shape[0], layout.rows_per_cut

    for part in layout.parts:
        if part.rows_per_line:
            lines = [
                line
                for begin in range(0, num_rows, step)
                for line in range(*part.lines(begin, min(begin + step, num_rows)))
            ]
            assert lines == list(range(part.num_lines))

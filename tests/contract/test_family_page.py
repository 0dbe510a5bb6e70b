"""The page on families prints Persimmon whole, and has every field, part and name that there is."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_families import variants
from transformers import AutoConfig

import flexport.models
from flexport.errors import UnsupportedModel
from flexport.models import Config, families, layer_tensors, spec_of

ROOT = Path(__file__).parent.parent.parent

FOLDER = ROOT / "tests" / "persimmon"

FILES = sorted(
    path.relative_to(FOLDER).as_posix()
    for pattern in ("*.toml", "flexport_persimmon/*.py", "tests/*.py")
    for path in FOLDER.glob(pattern)
)

RECORDS = (
    "ModelSpec", "Layer", "Attention", "Fused", "HeadNorm", "LatentAttention", "Norm", "Mlp",
    "ClampedSilu", "Experts",
)  # fmt: skip


def page() -> str:
    return (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def section(heading: str) -> str:
    """What stands between a heading and the next one."""
    return re.split(r"^#+ ", page().split(f"# {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[
        0
    ]


def printed() -> dict[str, str]:
    """The files that the page prints: a path in backquotes and a colon, then a block of code."""
    return dict(
        re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", page(), re.DOTALL | re.MULTILINE)
    )


def imported_by(pattern: str) -> set[tuple[str, str]]:
    """Modules of flexport and the names that the package's files import from them."""
    found: set[tuple[str, str]] = set()
    for path in FOLDER.glob(pattern):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not isinstance(node, ast.Import) or node.names[0].name == "pytest"
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flexport."):
                found |= {(node.module or "", name.name) for name in node.names}
    return found


def test_the_page_prints_every_file_as_it_is() -> None:
    assert printed() == {name: (FOLDER / name).read_text(encoding="utf-8") for name in FILES}


def test_the_package_is_less_than_200_lines() -> None:
    assert sum(len(code.splitlines()) for code in printed().values()) < 200


def test_the_family_imports_public_names_alone() -> None:
    imported = imported_by("flexport_persimmon/*.py")

    assert {module for module, _ in imported} == {"flexport.models"}
    assert {name for _, name in imported} <= set(flexport.models.__all__)


@pytest.mark.parametrize("name", RECORDS)
def test_the_page_has_every_field_of_a_record_with_its_default(name: str) -> None:
    record = getattr(flexport.models, name)

    rows = re.findall(r"^\| `(\w+)` \| (?:`(.*?)` )?\| .*\|$", section(f"`{name}`"), re.MULTILINE)

    assert rows == [
        (field.name, "" if field.default is dataclasses.MISSING else repr(field.default))
        for field in dataclasses.fields(record)
    ]


def test_the_page_has_every_part_that_a_checkpoint_may_have() -> None:
    table = re.findall(r"^\| (`.*?`) \| .* \|$", section("Names"), re.MULTILINE)
    named = {part for cell in table for part in re.findall(r"`([\w.]+)`", cell)}

    slots = set()
    for variant in variants():
        spec = spec_of(AutoConfig.for_model(variant.family, **variant.config).to_dict())
        for layer in range(spec.num_schedule_layers):
            slots |= {tensor.slot.partition("@")[0] for tensor in layer_tensors(spec, layer)}

    parts = {slot if slot in named else re.sub(r"\.(weight|bias)$", "", slot) for slot in slots}
    assert parts == named


def test_every_call_that_the_page_shows_is_there() -> None:
    calls = re.findall(r"fields\.(\w+)", section("What can't be run"))
    others = re.findall(
        r"`(\w+)`", " ".join(re.findall(r"^\| (`fields.*?) \|", page(), re.MULTILINE))
    )

    assert len(calls) > 5
    assert all(callable(getattr(Config, name)) for name in [*calls, *others])


def test_its_entry_point_is_all_it_takes(install: Callable[[Path], None]) -> None:
    with pytest.raises(UnsupportedModel, match="no model family 'persimmon'"):
        spec_of({"model_type": "persimmon"})

    install(FOLDER)

    listed = [family for family in families() if family.model_type == "persimmon"]
    assert [family.source for family in listed] == ["flexport-persimmon"]
    assert flexport.models.about("persimmon").startswith("Persimmon 8B: ")
    assert spec_of({"model_type": "persimmon"}).num_layers == 36

"""The registry, with plug-ins written to a folder on the path as pip would install them."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flexport.cli import backends as command
from flexport.errors import BackendUnavailable
from flexport.registry import (
    Listing,
    auto_order,
    backends,
    describe_backend,
    open_backend,
    which_backend,
)

Install = Callable[..., None]

GOOD = """
from flexport.backend import BackendPlugin

class Fake:
    capabilities = None
    def allocate(self, shape, dtype, where="device"): ...
    def copy_async(self, src, dst): ...
    def matmul(self, x, weight, bias=None): ...
    def attention(self, q, keys, values, spec): ...
    def sync(self): ...
    def close(self): ...

PLUGIN = BackendPlugin(api={api}, rank={rank}, probe=lambda: {reason!r}, open=Fake)
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install(name, source) makes a distribution `flexport-NAME` with the backend `name`."""
    monkeypatch.delenv("FLEXPORT_BACKEND", raising=False)

    def make(name: str, source: str, *, distribution: str | None = None) -> None:
        distribution = distribution or f"flexport-{name}"
        module = distribution.replace("-", "_") + "_plugin"
        (tmp_path / f"{module}.py").write_text(source, encoding="utf-8")
        info = tmp_path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n", encoding="utf-8"
        )
        (info / "entry_points.txt").write_text(
            f"[flexport.backends]\n{name} = {module}:PLUGIN\n", encoding="utf-8"
        )
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def good(*, api: int = 1, rank: int = 150, reason: str | None = None) -> str:
    return GOOD.format(api=api, rank=rank, reason=reason)


def listed(name: str) -> Listing:
    (found,) = [listing for listing in backends() if listing.name == name]
    return found


def test_the_cpu_is_installed_and_usable() -> None:
    cpu = listed("cpu")

    assert cpu.usable
    assert cpu.distribution == "flexport"
    assert cpu.version


def test_a_strangers_plugin_is_listed_with_its_distribution(install: Install) -> None:
    install("toaster", good())

    toaster = listed("toaster")

    assert toaster.usable
    assert (toaster.distribution, toaster.version) == ("flexport-toaster", "1.5")


def test_the_probes_answer_is_the_reason(install: Install) -> None:
    install("toaster", good(reason="no toaster is plugged in"))

    assert listed("toaster").reason_not_usable == "no toaster is plugged in"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import module_that_is_nowhere", "module_that_is_nowhere"),
        ("raise SystemExit(3)", "SystemExit"),
        ("x = 1", "PLUGIN"),
        ("PLUGIN = 'a string'", "is a str, not a BackendPlugin"),
        (good(api=99), "version 99"),
        (good().replace("lambda: None", "lambda: 1 / 0"), "ZeroDivisionError"),
        (good().replace("lambda: None", "lambda: 7"), "answered 7"),
    ],
)
def test_a_broken_plugin_is_reported_and_stops_no_other(
    install: Install, source: str, words: str
) -> None:
    install("broken", source)

    broken = listed("broken")

    assert broken.reason_not_usable is not None
    assert words in broken.reason_not_usable
    assert listed("cpu").usable


def test_of_two_plugins_with_one_name_the_second_is_reported(install: Install) -> None:
    install("toaster", good(), distribution="maker-a")
    install("toaster", good(), distribution="maker-b")

    found = [listing for listing in backends() if listing.name == "toaster"]

    assert [listing.usable for listing in found].count(True) == 1
    (refused,) = [listing for listing in found if not listing.usable]
    assert "already taken" in str(refused.reason_not_usable)


def test_auto_order_is_by_rank_then_name_and_leaves_out_the_unusable(install: Install) -> None:
    install("beta", good(rank=160))
    install("alpha", good(rank=160))
    install("weak", good(rank=1))
    install("absent", good(rank=199, reason="not here"))

    order = [listing.name for listing in auto_order(backends())]

    # Besides these, a machine may have devices, and plug-ins, of its own.
    own = {"alpha", "beta", "cpu", "weak", "absent"}
    assert [name for name in order if name in own] == ["alpha", "beta", "cpu", "weak"]


def test_auto_opens_the_highest_rank(install: Install) -> None:
    install("toaster", good(rank=199))

    name, backend = open_backend()

    assert name == which_backend() == "toaster"
    assert type(backend).__name__ == "Fake"


def test_auto_goes_on_when_opening_fails_and_says_so(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install("toaster", good(rank=199).replace("open=Fake", "open=lambda: 1 / 0"))

    name, backend = open_backend("auto")
    backend.close()

    assert name == "cpu"
    assert "ZeroDivisionError" in caplog.text


def test_a_backend_that_lacks_a_verb_is_refused(install: Install) -> None:
    install("toaster", good().replace("def sync", "def sink"))

    with pytest.raises(BackendUnavailable, match="lacks sync"):
        open_backend("toaster")


def test_an_unknown_name_is_refused_with_the_installed_ones(install: Install) -> None:
    install("toaster", good())

    with pytest.raises(BackendUnavailable, match=r"'kettle' is not installed; .*cpu.*toaster"):
        open_backend("kettle")


def test_an_unusable_name_is_refused_with_its_reason_and_the_usable_ones(install: Install) -> None:
    install("toaster", good(reason="no toaster is plugged in"))

    with pytest.raises(BackendUnavailable, match=r"no toaster is plugged in; usable: cpu"):
        open_backend("toaster")


def test_the_environment_names_what_auto_stands_for(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("toaster", good(rank=1))
    monkeypatch.setenv("FLEXPORT_BACKEND", "toaster")

    assert open_backend("auto")[0] == which_backend("auto") == "toaster"


def test_a_name_from_the_environment_is_blamed_on_it(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("toaster", good())
    monkeypatch.setenv("FLEXPORT_BACKEND", "kettle")

    with pytest.raises(BackendUnavailable, match="from FLEXPORT_BACKEND"):
        open_backend("auto")


def test_a_backend_is_described_without_being_opened(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = "lambda: Capabilities(name='toaster', memory_bytes=7, unified=False, "
    facts += "dtypes=('float32',), dtype_reason='so', page_tokens=16)"
    source = good().replace("open=Fake", f"open=Fake, describe={facts}")
    install("toaster", source.replace("import BackendPlugin", "import BackendPlugin, Capabilities"))

    for name in ("toaster", "auto"):
        described = describe_backend(name)
        assert described is not None
        assert described.memory_bytes == 7
    monkeypatch.setenv("FLEXPORT_BACKEND", "cpu")
    described = describe_backend("auto")
    assert described is not None
    assert described.unified


@pytest.mark.parametrize(
    "source",
    [
        good(),
        good(reason="no bread").replace("open=Fake", "open=Fake, describe=1"),
        good().replace("open=Fake", "open=Fake, describe=lambda: 1 / 0"),
        "broken",
    ],
    ids=["says nothing", "not usable", "fails", "does not load"],
)
def test_a_backend_that_does_not_describe_itself_is_asked_when_it_is_open(
    source: str, install: Install
) -> None:
    install("toaster", source)

    assert describe_backend("toaster") is None


NUMBERED = (
    "open=Fake, open_index=lambda index: (Fake, Second)[index](), "
    "describe_index=lambda index: Capabilities(name=f'toaster {index}', memory_bytes=7, "
    "unified=False, dtypes=('float32',), dtype_reason='so', page_tokens=16)"
)


def numbered() -> str:
    """A backend with two devices."""
    source = good().replace("import BackendPlugin", "import BackendPlugin, Capabilities")
    return source.replace("PLUGIN =", "class Second(Fake): ...\n\nPLUGIN =").replace(
        "open=Fake", NUMBERED
    )


def test_a_number_behind_the_name_opens_that_device(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("toaster", numbered())

    opened = [open_backend(name) for name in ("toaster", "toaster:0", "toaster:1")]
    described = describe_backend("toaster:1")
    monkeypatch.setenv("FLEXPORT_BACKEND", "toaster:1")
    by_environment = open_backend("auto")

    assert [name for name, _ in opened] == ["toaster", "toaster:0", "toaster:1"]
    assert [type(backend).__name__ for _, backend in opened] == ["Fake", "Fake", "Second"]
    assert described is not None
    assert described.name == "toaster 1"
    assert type(by_environment[1]).__name__ == "Second"


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("cpu:0", "asks for device 0, and this backend has only one; write cpu without a number"),
        ("toaster:2", "did not open: IndexError"),
        ("toaster:", "has '' where the number of a device belongs; write e.g. toaster:0"),
        ("toaster:-1", "has '-1' where"),
        ("toaster:1:1", "has '1:1' where"),
        ("auto:1", "'auto:1' is not installed; installed: cpu"),
        ("kettle:1", "'kettle:1' is not installed"),
    ],
)
def test_a_number_that_means_no_device_is_refused(
    name: str, complaint: str, install: Install
) -> None:
    install("toaster", numbered())

    with pytest.raises(BackendUnavailable, match=complaint):
        open_backend(name)


def test_a_backend_of_one_device_describes_none_by_number(install: Install) -> None:
    install("toaster", good())

    assert describe_backend("toaster:0") is None


def test_a_given_name_wins_over_the_environment(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install("toaster", good())
    monkeypatch.setenv("FLEXPORT_BACKEND", "kettle")

    assert open_backend("toaster")[0] == "toaster"


def test_listing_and_the_command_do_not_import_torch() -> None:
    script = (
        "import argparse, sys\n"
        "from flexport.cli import backends\n"
        "backends.run(argparse.Namespace(json=False))\n"
        "sys.exit('torch' in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)

    assert done.returncode == 0, done.stderr.decode()


def test_the_table_marks_what_auto_takes_and_gives_reasons(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("toaster", good(reason="no toaster is plugged in"))

    assert command.run(argparse.Namespace(json=False)) == 0

    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("*  cpu") and line.endswith("yes") for line in lines)
    assert any("flexport-toaster 1.5" in line and "no toaster" in line for line in lines)


def test_the_json_list_has_one_object_a_backend(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install("toaster", good(rank=199))

    assert command.run(argparse.Namespace(json=True)) == 0

    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["toaster"] == {
        "name": "toaster",
        "distribution": "flexport-toaster",
        "version": "1.5",
        "usable": True,
        "reason": None,
        "auto": True,
    }
    assert rows["cpu"]["auto"] is False

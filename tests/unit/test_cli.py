"""The command line's surface: what is accepted, what is refused, and with which exit code."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest

from flexport.cli import main as cli
from flexport.cli.engine_options import add_engine_arguments, engine_settings
from flexport.errors import CheckpointError, RunError, UsageError
from flexport.policy import Policy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes `flexport fake` do what a function does; a fresh module stands in for a subcommand."""

    def make(run: Any) -> None:
        module = ModuleType("flexport_fake_command")
        module.add_arguments = lambda parser: parser.add_argument("--level", type=int)  # type: ignore[attr-defined]
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(cli.COMMANDS, "fake", (module.__name__, "do what a test says"))
        monkeypatch.delenv("FLEXPORT_DEBUG", raising=False)

    return make


def raising(error: BaseException) -> Any:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_engine_arguments(parser)
    return parser.parse_args(arguments)


def test_help_lists_every_command_on_stdout(capsys):
    code = cli.main(["--help"])

    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert all(name in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name, capsys):
    code = cli.main([name, "--help"])

    assert code == 0
    assert f"usage: flexport {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["--no-such-option"],
        ["fake", "--no-such-option"],
        ["fake", "stray"],
        ["fake", "--lev", "1"],  # an abbreviation: it would change its meaning as options grow
        ["fake", "--level", "high"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_and_says_where_help_is(command, capsys, arguments):
    command(lambda args: 0)

    code = cli.main(arguments)

    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("flexport: error: ")
    assert "--help" in err


def test_a_command_gets_its_options_and_gives_its_exit_code(command):
    command(lambda args: args.level)

    assert cli.main(["fake", "--level", "1"]) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("no such file: x"), 2),
        (CheckpointError("lying header"), 2),
        (RunError("the disk went away"), 1),
    ],
)
def test_an_error_raised_on_purpose_is_one_line_and_an_exit_code(command, capsys, error, code):
    command(raising(error))

    found = cli.main(["fake"])

    out, err = capsys.readouterr()
    assert (found, out, err) == (code, "", f"flexport: error: {error}\n")


def test_an_interrupt_exits_130(command, capsys):
    command(raising(KeyboardInterrupt()))

    assert cli.main(["fake"]) == 130
    assert capsys.readouterr().err == "flexport: interrupted\n"


@pytest.mark.parametrize("arguments", [["--debug", "fake"], ["fake", "--debug"]])
def test_debug_shows_where_an_error_came_from(command, arguments):
    command(raising(RunError("the disk went away")))

    with pytest.raises(RunError):
        cli.main(arguments)


def test_debug_may_come_from_the_environment(command, monkeypatch):
    command(raising(RunError("the disk went away")))
    monkeypatch.setenv("FLEXPORT_DEBUG", "1")

    with pytest.raises(RunError):
        cli.main(["fake"])


def test_a_fault_of_our_own_is_not_dressed_up_as_the_user_s(command):
    command(raising(ZeroDivisionError()))

    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE to be quiet about")
def test_a_reader_that_goes_away_is_no_error_message():
    program = (
        "import sys\n"
        "from types import ModuleType\n"
        "from flexport.cli import main as cli\n"
        "talk = ModuleType('talk')\n"
        "talk.add_arguments = lambda parser: None\n"
        "talk.run = lambda args: print('x' * (1 << 20)) or 0\n"
        "sys.modules['talk'] = talk\n"
        "cli.COMMANDS['talk'] = ('talk', 'print more than a pipe holds')\n"
        "sys.exit(cli.main(['talk']))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()

    assert (process.returncode, err) == (1, b"")


def test_backends_lists_the_cpu_as_usable(capsys):
    code = cli.main(["backends", "--json"])

    rows = json.loads(capsys.readouterr().out)
    assert code == 0
    assert [row["usable"] for row in rows if row["name"] == "cpu"] == [True]


def test_options_not_given_are_left_to_the_engine_s_defaults():
    assert engine_settings(parse()) == {}


def test_options_given_reach_the_engine_under_their_own_names():
    args = parse(
        *("--model", "facebook/opt-30b", "--revision", "main", "--load-format", "dummy"),
        *("--backend", "cpu", "--dtype", "bfloat16", "--batch-size", "8", "--num-batches", "3"),
        *("--prefill-tokens", "512", "--sweep-tokens", "0", "--offload-dir", "spill"),
        *("--percent", "0", "20.5", "50", "50", "100", "0"),
        *("--cpu-attention", "on", "--compress-cache", "int4", "--compress-weights", "auto"),
        *("--max-latency", "90.5"),
        *("--cpu-attention", "on", "--compress-cache", "int4", "--attn-sparsity", "0.1"),
        *("--device-memory", "14GiB", "--host-memory", "1.5GB", "--disk-memory", "0"),
    )

    assert engine_settings(args) == {
        "model": "facebook/opt-30b",
        "revision": "main",
        "load_format": "dummy",
        "backend": "cpu",
        "dtype": "bfloat16",
        "batch_size": 8,
        "num_batches": 3,
        "prefill_tokens": 512,
        "sweep_tokens": 0,
        "offload_dir": "spill",
        "percent": [0.0, 20.5, 50.0, 50.0, 100.0, 0.0],
        "cpu_attention": "on",
        "compress_cache": "int4",
        "compress_weights": "auto",
        "max_latency": 90.5,
        "attn_sparsity": 0.1,
        "device_memory": 14 * 2**30,
        "host_memory": 1_500_000_000,
        "disk_memory": 0,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch-size", "0"],
        ["--num-batches", "two"],
        ["--prefill-tokens", "1.5"],
        ["--sweep-tokens", "-1"],
        ["--device-memory", "lots"],
        ["--dtype", "float64"],
        ["--load-format", "pickle"],
        ["--percent", "10", "20"],
        ["--cpu-attention", "maybe"],
        ["--compress-cache", "int2"],
        ["--max-latency", "0"],
        ["--max-latency", "soon"],
        ["--attn-sparsity", "0"],
        ["--attn-sparsity", "1.5"],
        ["--attn-sparsity", "nan"],
        ["--attn-sparsity", "a tenth"],
    ],
    ids=" ".join,
)
def test_an_option_value_that_can_not_work_is_refused(arguments):
    with pytest.raises(argparse.ArgumentError, match=arguments[0]):
        parse(*arguments)


def test_a_policy_file_is_read_before_anything_is_loaded(tmp_path):
    policy = Policy(batch_size=3, num_batches=5)
    path = tmp_path / "policy.json"
    path.write_text(policy.to_json(), encoding="utf-8")

    assert engine_settings(parse("--policy", str(path))) == {"policy": policy}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--percent", "0", "100", "0", "100", "0", "100"],
        ["--batch-size", "8"],
        ["--sweep-tokens", "0"],
        ["--cpu-attention", "off"],
        ["--compress-cache", "none"],
        ["--max-latency", "10"],
    ],
    ids=" ".join,
)
def test_a_policy_file_and_a_part_of_a_policy_contradict_each_other(tmp_path, arguments):
    path = tmp_path / "policy.json"
    path.write_text(Policy().to_json(), encoding="utf-8")

    with pytest.raises(UsageError, match=f"{arguments[0]} both say the policy"):
        engine_settings(parse("--policy", str(path), *arguments))


def test_a_revision_of_something_that_has_none_is_refused(tmp_path):
    with pytest.raises(UsageError, match="embedded demo"):
        engine_settings(parse("--revision", "main"))
    with pytest.raises(UsageError, match="directory"):
        engine_settings(parse("--revision", "main", "--model", str(tmp_path)))

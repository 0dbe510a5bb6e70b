"""The `flexport` command: finds the subcommand, runs it, turns errors into exit codes.

Exit codes: 0 done; 1 failed, or some rows failed; 2 wrong usage or an input that can't work;
130 interrupted. stdout is data, stderr is talk.

A subcommand is one module with `add_arguments(parser)` and `run(args) -> exit code`. It is
imported when it is run, so `flexport --help` costs no more than the table below.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from flexport import __version__, process
from flexport.errors import FlexportError, UsageError

__all__ = ["COMMANDS", "main"]

DONE = 0
FAILED = 1
WRONG_USAGE = 2
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""

COMMANDS = {
    "run": (
        "flexport.cli.run",
        "run a file of prompts through a model; with no options, the embedded demo",
    ),
    "plan": (
        "flexport.cli.plan",
        "say what a run would do and how long it would take, here or on another machine",
    ),
    "bench": ("flexport.cli.bench", "measure generation throughput on synthetic prompts"),
    "profile": (
        "flexport.cli.profile",
        "measure this machine (disk, links, kernels) for a minute, and keep what was found",
    ),
    "quality": (
        "flexport.cli.quality",
        "measure what packing weights and KV cache does to a model's answers, on any text",
    ),
    "backends": ("flexport.cli.backends", "list the registered backends: usable, or why not"),
    "pack": (
        "flexport.cli.pack",
        "compress a model's weights ahead of time, or show, check and remove what is compressed",
    ),
    "models": ("flexport.cli.models", "list model families and known models, or show one model"),
}
"""Each command's module and its line in `flexport --help`."""

_EPILOG = "`flexport COMMAND --help` explains every option with its unit and default."


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of `flexport ARGV...`; argv defaults to the process's own arguments."""
    process.prepare()
    arguments = list(sys.argv[1:] if argv is None else argv)
    # argparse may fail before it has seen the option, and its errors need no traceback.
    debug = bool(os.environ.get("FLEXPORT_DEBUG"))
    try:
        args = _parser().parse_args(arguments)
        debug = debug or args.debug
        _talk_on_stderr(args.verbose)
        code: int = args.module.run(args)
        sys.stdout.flush()  # a closed pipe shows here, where it is handled
    except SystemExit as exit_:  # argparse: --help, --version, wrong usage
        return exit_.code if isinstance(exit_.code, int) else DONE
    except FlexportError as error:
        if debug:
            raise
        print(f"flexport: error: {error}", file=sys.stderr)
        return WRONG_USAGE if isinstance(error, UsageError) else FAILED
    except BrokenPipeError:
        # Whoever read our output has seen enough. Python flushes stdout once more at exit; what
        # is left in its buffer must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        if debug:
            raise
        print("flexport: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


class _Parser(argparse.ArgumentParser):
    """argparse's own, less the usage dump: with forty options it would bury the message."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_USAGE, f"flexport: error: {message}\nTry `{self.prog} --help`.\n")


class _CommandParser(_Parser):
    """The parser of one subcommand, which asks the subcommand's module only when it is used."""

    def __init__(self, *, module: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._module = module
        _add_common_arguments(self)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        module = import_module(self._module)
        module.add_arguments(self)
        self.set_defaults(module=module)
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        if unknown:
            self.error(f"unknown option or argument: {' '.join(unknown)}")
        return namespace, unknown


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flexport",
        description="Run a whole file of prompts through a model that does not fit in memory.",
        epilog=_EPILOG,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"flexport {__version__}")
    _add_common_arguments(parser)
    parser.set_defaults(debug=False, verbose=0)
    commands = parser.add_subparsers(
        title="commands", metavar="COMMAND", required=True, parser_class=_CommandParser
    )
    for name, (module, help_line) in COMMANDS.items():
        # What a parser_class takes beyond argparse's own settings, the stubs can't know.
        settings: dict[str, Any] = {"module": module}
        commands.add_parser(
            name,
            help=help_line,
            description=f"{help_line[0].upper()}{help_line[1:]}.",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Options that may stand before the command or after it."""
    parser.add_argument(
        "-v",
        "--verbose",
        action="count",
        default=argparse.SUPPRESS,
        help="say more on stderr; twice: everything",
    )
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the traceback of an error (also: FLEXPORT_DEBUG=1 in the environment)",
    )


def _talk_on_stderr(verbose: int) -> None:
    levels = (logging.WARNING, logging.INFO, logging.DEBUG)
    for_people, for_developers = (
        "flexport: %(message)s",
        "%(relativeCreated)8.0f ms %(name)s: %(message)s",
    )
    logging.basicConfig(stream=sys.stderr, format=for_people if verbose < 2 else for_developers)
    logging.getLogger("flexport").setLevel(levels[min(verbose, 2)])

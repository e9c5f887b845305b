"""Arguments in, exit code out."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from compression_manager.cli import check, compare, inspect, new_plugin, plugins, report
from compression_manager.cli.outcome import Outcome
from compression_manager.errors import CompressionError

PROGRAM = "compression-manager"
_EXIT_CODES = """\
exit codes:
  0  all is well
  1  what was checked is invalid; stderr says why
  2  wrong usage
"""
_EXAMPLE = """\
example:
  compression-manager check recipe.yaml plugins.qat.weight.bits=4
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 if what was checked is invalid.

    Args:
        arguments: without the program's name; None: those of the process.

    Raises:
        SystemExit: wrong usage (code 2), or `--help` and `--version` (code 0).
    """
    options = build_parser().parse_args(arguments)
    try:
        # What a plugin prints while it is imported must not end up in the output.
        with contextlib.redirect_stdout(sys.stderr):
            outcome: Outcome = options.run(options)
    except (CompressionError, OSError) as error:
        outcome = Outcome("", ("\n".join([str(error), *getattr(error, "__notes__", ())]),))
    _write(outcome.output)
    for problem in outcome.problems:
        print(f"{PROGRAM}: {problem}", file=sys.stderr)
    return 1 if outcome.problems else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command and of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look at plugins, recipes, checkpoints and training runs, or begin a plugin of "
        "your own. "
        "`COMMAND --help` explains each.",
        epilog=f"{_EXAMPLE}\n{_EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in (plugins, check, inspect, report, compare, new_plugin):
        subparser = commands.add_parser(
            command.NAME,
            help=command.SUMMARY,
            description=command.DESCRIPTION,
            epilog=f"{command.EXAMPLES}\n{_EXIT_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def _write(text: str) -> None:
    """Write to stdout, whatever its encoding, and though nobody may read to the end."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Else Python would complain when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    try:
        return version(PROGRAM)
    except PackageNotFoundError:
        return "(not installed)"

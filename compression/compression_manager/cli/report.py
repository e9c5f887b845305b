"""`compression-manager report`: a training run as a page to look at."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression_manager.cli.outcome import Outcome
from compression_manager.cli.waiting import waiting
from compression_manager.errors import CheckpointError
from compression_manager.run_report.page import render
from compression_manager.run_report.run import read_run
from compression_manager.state.files import write_file

NAME = "report"
SUMMARY = "write one HTML page about a training run"
DESCRIPTION = """\
Read what a training run left in its folder, checkpoints and TensorBoard's event files or
one of the two, and write one HTML page that needs no network: summary, charts of loss
terms, metrics and ranges, every layer, notes, recipe and environment. Prints its path.

RUN is the folder that holds both, such as runs/demo with runs/demo/checkpoints and
runs/demo/tensorboard; or a folder of checkpoints, one checkpoint, or a folder of event
files. The newest checkpoint is verified.
"""
EXAMPLES = """\
examples:
  compression-manager report runs/demo
  compression-manager report runs/demo -o demo.html
  compression-manager report runs/demo -o - | gzip > demo.html.gz
"""
_DEFAULT_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help=f"where to write the page; - for stdout (default: RUN/{_DEFAULT_NAME})",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Write the page, whole or not at all.

    Raises:
        CheckpointError: there is no run, it is damaged, or the page cannot be written.
    """
    folder = Path(options.run_folder)
    with waiting(f"reading {folder}"):
        page = render(read_run(folder))
    if options.output == "-":
        return Outcome(page)
    output = folder / _DEFAULT_NAME if options.output is None else Path(options.output)
    return Outcome(f"{write_page(output, page)}\n")


def write_page(output: Path, page: str) -> Path:
    """Write a page whole or not at all, and return its path.

    Raises:
        CheckpointError: it cannot be written.
    """
    if output.is_dir():
        raise CheckpointError(f"{output} is a folder; name a file in it.")
    write_file(output, page)
    return output

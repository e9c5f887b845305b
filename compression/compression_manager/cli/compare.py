"""`compression-manager compare`: what several runs achieved, and how they differ."""

from __future__ import annotations

import argparse
from pathlib import Path

from compression_manager.cli.outcome import Outcome, to_json
from compression_manager.cli.report import write_page
from compression_manager.cli.waiting import waiting
from compression_manager.run_report.comparison import compare, render_comparison
from compression_manager.run_report.run import read_run

NAME = "compare"
SUMMARY = "show training runs side by side"
DESCRIPTION = """\
Print a table with a column for each run: optimizer steps, bytes, metrics and loss terms,
and those options of the recipes that differ. A loss is the mean over the last tenth of the
recorded steps; - stands for what a run does not have.

Each RUN is a folder as `compression-manager report` takes it.
"""
EXAMPLES = """\
examples:
  compression-manager compare runs/a runs/b
  compression-manager compare runs/* --json | python -m json.tool
  compression-manager compare runs/a runs/b --html comparison.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="folder of a training run")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--html", metavar="FILE", help="also write an HTML page with the charts of all runs"
    )


def run(options: argparse.Namespace) -> Outcome:
    """Compare the runs.

    Raises:
        CheckpointError: a folder holds no run, or the page cannot be written.
    """
    runs = []
    for folder in options.run_folders:
        with waiting(f"reading {folder}"):
            runs.append(read_run(Path(folder)))
    comparison = compare(runs)
    if options.html is not None:
        write_page(Path(options.html), render_comparison(runs))
    return Outcome(to_json(comparison.to_dict()) if options.json else f"{comparison}\n")

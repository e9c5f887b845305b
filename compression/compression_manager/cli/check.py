"""`compression-manager check`: is a recipe valid, and what does it mean?"""

from __future__ import annotations

import argparse
from typing import Any

from compression_manager.cli.outcome import Outcome, to_yaml
from compression_manager.cli.recipe_check import check_recipe

NAME = "check"
SUMMARY = "validate a recipe and print it with every option's value"
DESCRIPTION = """\
Validate a recipe as prepare_compression does before it looks at the model, and print the
resolved recipe: overrides applied, every option with its value, default providers added,
plugins with enabled=false left out. The output is itself a recipe.

Live objects, such as a teacher, are not needed. Comments at the top of the output name
those that are still to be passed to prepare_compression. What depends on the model, such
as names of layers, names of losses, and folders to write to are checked there.
"""
EXAMPLES = """\
examples:
  compression-manager check recipe.yaml
  compression-manager check recipe.yaml plugins.distillation.criterion.temperature=2 seed=1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    parser.add_argument(
        "overrides",
        metavar="OVERRIDE",
        nargs="*",
        help="an assignment that comes last, for example plugins.qat.weight.bits=4",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Check the recipe.

    Raises:
        CompressionError: it is invalid.
    """
    checked = check_recipe(options.recipe, options.overrides)
    notes = "".join(f"# {note}\n" for note in checked.notes)
    return Outcome(notes + to_yaml(_escaped(checked.resolved)))


def _escaped(value: Any) -> Any:
    """Return plain values whose texts mean the same in a recipe, where ${...} is looked up."""
    if isinstance(value, dict):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value

"""`compression-manager new-plugin`: write the distribution of a new plugin."""

from __future__ import annotations

import argparse
import os
import re
import tempfile
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from string import Template

from compression_manager.cli.outcome import Outcome
from compression_manager.errors import ConfigError
from compression_manager.plugin_host.discovery import ENTRY_POINT_GROUP, installed_plugins

NAME = "new-plugin"
SUMMARY = "write a plugin of your own to start from"
DESCRIPTION = """\
Write a distribution with a plugin that works: options, one hook, type hints, and tests that
hold it to the contract of all plugins. Change it into yours.

Nothing that exists is overwritten, and after an error nothing is left behind.
"""
EXAMPLES = """\
examples:
  compression-manager new-plugin weight_noise
  compression-manager new-plugin weight_noise --directory plugins/weight-noise
"""
# Template -> file.
_FILES = {
    "README.md": "README.md",
    "pyproject.toml": "pyproject.toml",
    "__init__.py": "src/$package/__init__.py",
    "config.py": "src/$package/config.py",
    "plugin.py": "src/$package/plugin.py",
    "test_plugin.py": "tests/test_$plugin.py",
}
_MARKER = "src/$package/py.typed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument(
        "name", metavar="NAME", help="the plugin's name in recipes, for example weight_noise"
    )
    parser.add_argument(
        "--directory",
        metavar="DIRECTORY",
        help="folder to create; default: compression-NAME in the present one",
    )


def run(options: argparse.Namespace) -> Outcome:
    """Write the distribution.

    Raises:
        ConfigError: the name is taken or unfit, or the folder cannot be created.
        OSError: it cannot be written.
    """
    name: str = options.name
    _check_name(name)
    distribution = f"compression-{name.replace('_', '-')}"
    directory = Path(options.directory or distribution)
    if os.path.lexists(directory):
        raise ConfigError(f"{directory} exists already; nothing is overwritten.")
    if not directory.parent.is_dir():
        raise ConfigError(f"{directory.parent} is no folder in which {directory.name} could be.")
    contents = _contents(
        {
            "plugin": name,
            "package": _package(name),
            "prefix": "".join(part.capitalize() for part in name.split("_")),
            "distribution": distribution,
            "group": ENTRY_POINT_GROUP,
        }
    )
    _write(directory, contents)
    written = "".join(f"  {path}\n" for path in sorted(contents))
    return Outcome(
        f"{directory} is written:\n{written}\nnext:\n  cd {directory}\n"
        "  pip install --editable '.[test]'\n  python -m pytest\n"
        f"  compression-manager plugins {name}\n"
    )


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        words = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower())
        near = re.sub(r"^[0-9_]+", "", "_".join(words))
        hint = f"; did you mean '{near}'?" if near else "."
        raise ConfigError(
            f"'{name}' cannot be the name of a plugin, which consists of lower-case letters, "
            f"digits and single underscores, such as weight_noise{hint}"
        )
    entries = installed_plugins().get(name)
    if entries:
        owners = " and ".join(entry.dist.name if entry.dist else "?" for entry in entries)
        raise ConfigError(f"a plugin named '{name}' is installed already, by {owners}.")
    if find_spec(_package(name)) is not None:
        raise ConfigError(
            f"the plugin '{name}' would be in the package {_package(name)}, but there is such a "
            "package already; choose another name."
        )


def _package(name: str) -> str:
    return f"compression_{name}"


def _contents(values: dict[str, str]) -> dict[str, str]:
    """Return path -> text of every file."""
    templates = files("compression_manager.cli") / "templates"
    texts = {
        path: (templates / f"{source}.txt").read_text(encoding="utf-8")
        for source, path in _FILES.items()
    }
    return {
        Template(path).substitute(values): Template(text).substitute(values)
        for path, text in {**texts, _MARKER: ""}.items()
    }


def _write(directory: Path, contents: dict[str, str]) -> None:
    """Write all files, or leave nothing behind."""
    with tempfile.TemporaryDirectory(prefix=".new-plugin-", dir=directory.parent) as folder:
        project = Path(folder, "project")
        for path, text in contents.items():
            file = project / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        project.rename(directory)

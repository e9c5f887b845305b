"""`compression-manager plugins`: what is installed, and which options it has."""

from __future__ import annotations

import argparse
import inspect
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

from compression_manager.cli.outcome import Outcome, to_json
from compression_manager.configuration.options import (
    OptionDescription,
    describe_options,
    nested_kinds,
)
from compression_manager.errors import ConfigError, PluginError, suggest
from compression_manager.plugin_host.discovery import installed_plugins, load_plugin_class

NAME = "plugins"
SUMMARY = "list installed plugins and their options"
DESCRIPTION = """\
List all installed plugins: the distribution that each comes from, and every option with
its type, default and meaning. With NAME, only that plugin, and also the options of the
values that its options take.

A plugin that cannot be used is listed with the reason; the exit code is then 1.
"""
EXAMPLES = """\
examples:
  compression-manager plugins
  compression-manager plugins distillation
  compression-manager plugins --json | python -m json.tool
"""
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommand's arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show this plugin in full")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> Outcome:
    """Describe all plugins, or one.

    Raises:
        ConfigError: no plugin of that name is installed.
    """
    installed = installed_plugins()
    if options.name is not None and options.name not in installed:
        raise ConfigError(
            f"no plugin named '{options.name}' is installed; {suggest(options.name, installed)}"
        )
    names = sorted(installed) if options.name is None else [options.name]
    described = [
        _describe(name, installed[name], with_values=options.name is not None) for name in names
    ]
    problems = tuple(
        f"plugin '{plugin['name']}' cannot be used: {plugin['error']}"
        for plugin in described
        if plugin["error"] is not None
    )
    if options.json:
        return Outcome(to_json({"plugins": described}), problems)
    return Outcome("\n".join("".join(_plugin_lines(plugin)) for plugin in described), problems)


def _describe(name: str, entries: list[EntryPoint], *, with_values: bool) -> dict[str, Any]:
    plugin: dict[str, Any] = {
        "name": name,
        "distributions": [_distribution(entry) for entry in entries],
        "class": None,
        "config_class": None,
        "summary": None,
        "options": [],
        "error": None,
    }
    try:
        plugin_class = load_plugin_class(name)
        config_class = plugin_class.config_class
        plugin |= {
            "class": f"{plugin_class.__module__}.{plugin_class.__qualname__}",
            "config_class": f"{config_class.__module__}.{config_class.__qualname__}",
            "summary": _summary(config_class),
            "options": [_option(option) for option in describe_options(config_class)],
        }
        if with_values:
            plugin["values"] = [
                _value(kind, type_name) for kind, type_name in nested_kinds([config_class]).items()
            ]
    except PluginError as error:
        plugin["error"] = str(error)
    except Exception as error:
        # Defaults and type hints are the plugin's own code.
        plugin["error"] = f"its options cannot be described: {type(error).__name__}: {error}"
    return plugin


def _distribution(entry: EntryPoint) -> dict[str, str | None]:
    found = entry.dist
    return {
        "name": None if found is None else found.name,
        "version": None if found is None else found.version,
    }


def _value(kind: type, type_name: str | None) -> dict[str, Any]:
    return {
        "class": kind.__name__,
        "type": type_name,
        "summary": _summary(kind),
        "options": [_option(option) for option in describe_options(kind)],
    }


def _option(option: OptionDescription) -> dict[str, Any]:
    return {
        "name": option.name,
        "type": option.type_name,
        "default": option.default,
        "help": option.help,
        "live_object": option.is_live_object,
    }


def _summary(config_class: type) -> str:
    return (inspect.getdoc(config_class) or "").partition("\n\n")[0].replace("\n", " ")


def _plugin_lines(plugin: dict[str, Any]) -> Iterator[str]:
    yield f"{plugin['name']} ({', '.join(map(_origin, plugin['distributions']))})\n"
    if plugin["error"] is not None:
        yield _indented(f"error: {plugin['error']}", 2)
        return
    yield _indented(plugin["summary"], 2)
    yield from _option_lines(plugin["options"])
    for value in plugin.get("values", ()):
        selected = "" if value["type"] is None else f" (type: {value['type']})"
        yield f"\n  {value['class']}{selected}\n"
        yield _indented(value["summary"], 4)
        yield from _option_lines(value["options"], indent=4)


def _option_lines(options: list[dict[str, Any]], *, indent: int = 2) -> Iterator[str]:
    for option in options:
        live = ", a live object" if option["live_object"] else ""
        default = "required" if option["default"] == "required" else f"default {option['default']}"
        yield f"{' ' * indent}{option['name']}: {option['type']} ({default}{live})\n"
        yield _indented(option["help"], indent + 4)


def _origin(distribution: dict[str, str | None]) -> str:
    if distribution["name"] is None:
        return "an unknown distribution"
    return f"{distribution['name']} {distribution['version']}"


def _indented(text: str, indent: int) -> str:
    prefix = " " * indent
    lines = textwrap.wrap(
        text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_long_words=False
    )
    return "".join(f"{line}\n" for line in lines)

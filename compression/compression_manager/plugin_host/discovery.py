"""Installed plugins: found by entry point, imported by name, created from a config.

The entry-point group carries the version of the hook API that a plugin was written for, so that
one for another version is refused without importing it. `compression_manager.plugins` without a
version is that of version 1, and stays so.
"""

from __future__ import annotations

import functools
import re
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from compression_manager.errors import CompressionError, ConfigError, PluginError, suggest
from compression_manager.hookspecs import HOOK_API_VERSION
from compression_manager.plugin import Plugin, PluginConfig

_ANY_GROUP = "compression_manager.plugins"
ENTRY_POINT_GROUP = f"{_ANY_GROUP}.v{HOOK_API_VERSION}"


def plugin_entry_points() -> list[EntryPoint]:
    """Return what distributions registered as plugins, for whatever version of the hook API."""
    return _entry_points_on(tuple(sys.path))


@functools.lru_cache(maxsize=1)  # reading the metadata of all distributions takes long
def _entry_points_on(path: tuple[str, ...]) -> list[EntryPoint]:
    installed = entry_points()
    groups = sorted(group for group in installed.groups if group.startswith(_ANY_GROUP))
    return [entry for group in groups for entry in installed.select(group=group)]


def installed_plugins() -> dict[str, list[EntryPoint]]:
    """Return name -> entry points of every installed plugin, without importing any.

    A name has several entry points when distributions compete for it. Those for other versions
    of the hook API are listed only where a name has none for ours.
    """
    entries = plugin_entry_points()
    usable = {entry.name for entry in entries if _is_ours(entry)}
    found: dict[str, list[EntryPoint]] = {}
    for entry in entries:
        known = found.setdefault(entry.name, [])
        is_new = all(entry.value != other.value for other in known)
        if is_new and (_is_ours(entry) or entry.name not in usable):
            known.append(entry)
    return found


def load_plugin_class(name: str) -> type[Plugin[Any]]:
    """Import the plugin registered under `name`, and no other.

    Raises:
        ConfigError: no plugin of that name is installed.
        PluginError: it was written for another version of the hook API, cannot be imported, is
            no `Plugin` subclass with a `config_class`, or two distributions install different
            ones; the message names the distribution.
    """
    installed = installed_plugins()
    if name not in installed:
        _entry_points_on.cache_clear()  # it may have been installed a moment ago, in a notebook
        installed = installed_plugins()
    if name not in installed:
        raise ConfigError(f"no plugin named '{name}' is installed; {suggest(name, installed)}")
    origins = [
        f"({entry.value}, installed by {_distribution_name(entry)})" for entry in installed[name]
    ]
    if len(origins) > 1:
        raise PluginError(
            f"several plugins have the name '{name}': {' and '.join(origins)}; uninstall all "
            "but one of these distributions.",
            plugin=name,
        )
    entry, origin = installed[name][0], f"plugin '{name}' {origins[0]}"
    if not _is_ours(entry):
        raise PluginError(f"{origin} {_mismatch(entry)}", plugin=name)
    try:
        plugin_class = entry.load()
    except Exception as error:
        raise PluginError(f"{origin} cannot be imported: {error!r}.", plugin=name) from error
    if not (isinstance(plugin_class, type) and issubclass(plugin_class, Plugin)):
        raise PluginError(
            f"{origin} must be a subclass of compression_manager.Plugin, got {plugin_class!r}.",
            plugin=name,
        )
    config_class = getattr(plugin_class, "config_class", None)
    is_config = isinstance(config_class, type) and issubclass(config_class, PluginConfig)
    if not is_config or getattr(config_class, "plugin", None) != name:
        raise PluginError(
            f"{origin} must set config_class to a PluginConfig whose 'plugin' is {name!r}.",
            plugin=name,
        )
    return plugin_class


def create_plugin(plugin_class: type[Plugin[Any]], config: PluginConfig) -> Plugin[Any]:
    """Return a new instance.

    Raises:
        PluginError: the constructor raised something that is none of our errors.
    """
    try:
        return plugin_class(config)
    except CompressionError:
        raise
    except Exception as error:
        name = config.name or config.plugin
        raise PluginError(
            f"plugin '{name}' cannot be created: {type(error).__name__}: {error}", plugin=name
        ) from error


def _is_ours(entry: EntryPoint) -> bool:
    return _version(entry) == HOOK_API_VERSION


def _version(entry: EntryPoint) -> int | None:
    """Return the hook API's version that a group stands for, or None if it says none."""
    if entry.group == _ANY_GROUP:
        return 1
    found = re.fullmatch(rf"{re.escape(_ANY_GROUP)}\.v([0-9]+)", entry.group)
    return int(found[1]) if found else None


def _mismatch(entry: EntryPoint) -> str:
    """Return what is wrong with the group of an entry point, and what to do."""
    distribution = _distribution_name(entry)
    version = _version(entry)
    if version is None:
        return (
            f"is registered in the entry-point group '{entry.group}', which does not say for which "
            f"version of the hook API it was written; {distribution} has to register it in "
            f"'{ENTRY_POINT_GROUP}'."
        )
    newer = version > HOOK_API_VERSION
    this, other = ("upgrade", "an older") if newer else ("downgrade", "a newer")
    return (
        f"needs hook API {version}, but this compression-manager has hook API "
        f"{HOOK_API_VERSION}; {this} compression-manager, or install {other} release of "
        f"{distribution}."
    )


def _distribution_name(entry: EntryPoint) -> str:
    if entry.dist is None:
        return "an unknown distribution"
    return f"{entry.dist.name} {entry.dist.version}"

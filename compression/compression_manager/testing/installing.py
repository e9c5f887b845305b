"""Offering a plugin class by its name, as if its distribution were installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from compression_manager.plugin import Plugin
from compression_manager.plugin_host import discovery


class _InMemoryEntryPoint(EntryPoint):
    """An entry point whose class need not be importable."""

    def load(self) -> Any:
        return vars(self)["plugin_class"]


def install_plugin(monkeypatch: pytest.MonkeyPatch, plugin_class: type[Plugin[Any]]) -> None:
    """Let configs and recipes find `plugin_class` by its name, until the test ends.

    Args:
        monkeypatch: pytest's fixture, which undoes it.
        plugin_class: as an entry point would name it; one that is installed under its name is
            hidden.
    """
    name = plugin_class.config_class.plugin
    origin = f"{plugin_class.__module__}:{plugin_class.__qualname__}"
    entry = _InMemoryEntryPoint(name, origin, discovery.ENTRY_POINT_GROUP)
    vars(entry)["plugin_class"] = plugin_class
    installed = discovery.plugin_entry_points  # may be a stand-in already

    def plugin_entry_points() -> list[EntryPoint]:
        return [*(item for item in installed() if item.name != name), entry]

    monkeypatch.setattr(discovery, "plugin_entry_points", plugin_entry_points)

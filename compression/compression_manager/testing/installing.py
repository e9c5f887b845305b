"""Offering a plugin class by its name, as if its distribution were installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from compression_manager import loading
from compression_manager.plugin import ENTRY_POINT_GROUP, Plugin


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
    entry = _InMemoryEntryPoint(name, origin, ENTRY_POINT_GROUP)
    vars(entry)["plugin_class"] = plugin_class
    # Not its home: what `loading` asks may be a stand-in already.
    installed = loading.entry_points  # type: ignore[attr-defined]

    def entry_points(group: str) -> list[EntryPoint]:
        others = [item for item in installed(group=group) if item.name != name]
        return [*others, entry] if group == ENTRY_POINT_GROUP else others

    monkeypatch.setattr(loading, "entry_points", entry_points)

"""Fake distributions, and a module that their entry points name."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from importlib.metadata import EntryPoint

import pytest

from compression_manager.plugin_host import discovery


class _Distribution:
    version = "1.2"

    def __init__(self, name: str) -> None:
        self.name = name


class _EntryPoint(EntryPoint):
    """An entry point that says which distribution installed it."""

    def with_distribution(self, name: str) -> EntryPoint:
        vars(self)["dist"] = _Distribution(name)
        return self


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install fake distributions: `install((name, "module:attribute", distribution), ...)`.

    A fourth item is the entry-point group, if it is another one than ours.
    """

    def install(*plugins: tuple[str, ...]) -> None:
        points = [
            _EntryPoint(name, value, *(group or [discovery.ENTRY_POINT_GROUP])).with_distribution(
                distribution
            )
            for name, value, distribution, *group in plugins
        ]
        monkeypatch.setattr(discovery, "plugin_entry_points", lambda: points)

    return install


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("third_party_module")
    monkeypatch.setitem(sys.modules, "third_party_module", module)
    return module

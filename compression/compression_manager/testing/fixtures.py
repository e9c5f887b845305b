"""pytest fixtures; `pytest_plugins = ["compression_manager.testing.fixtures"]` offers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from compression_manager.plugin import Plugin
from compression_manager.testing import installing
from compression_manager.testing.recording import RecordingPlugin


@pytest.fixture
def recording() -> RecordingPlugin:
    """A new plugin that records its events."""
    return RecordingPlugin()


@pytest.fixture
def install_plugin(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Plugin[Any]]], None]:
    """`install_plugin(MyPlugin)` lets configs and recipes find it by name, until the test ends."""

    def install(plugin_class: type[Plugin[Any]]) -> None:
        installing.install_plugin(monkeypatch, plugin_class)

    return install

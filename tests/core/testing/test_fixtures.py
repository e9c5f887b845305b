"""The fixtures that `pytest_plugins` offers; and what a missing pytest says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest

import toys
from compression_manager import ConfigError, Plugin, PluginConfig, option, prepare_compression
from compression_manager.plugin_host.discovery import installed_plugins, load_plugin_class
from compression_manager.testing import RecordingPlugin

pytest_plugins = ["compression_manager.testing.fixtures"]


@dataclass(frozen=True)
class OwnConfig(PluginConfig):
    plugin: ClassVar[str] = "own"

    factor: float = field(default=1.0, metadata=option("A number."))


class OwnPlugin(Plugin[OwnConfig]):
    config_class = OwnConfig


def test_an_installed_plugin_is_found_by_name_and_from_a_recipe(
    install_plugin: Callable[[type[Plugin[Any]]], None], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no plugin named 'own'"):
        prepare_compression(toys.mlp(), [OwnConfig()])
    before = set(installed_plugins())
    install_plugin(OwnPlugin)
    assert set(installed_plugins()) == {*before, "own"}
    prepare_compression(toys.mlp(), [OwnConfig()])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("plugins: {own: {factor: 2}}")
    manager = prepare_compression(toys.mlp(), recipe)
    assert manager.state_dict()["recipe"]["plugins"] == {"own": {"factor": 2.0}}


def test_it_hides_what_is_installed_under_the_name(
    install_plugin: Callable[[type[Plugin[Any]]], None],
) -> None:
    built_in = load_plugin_class("qat")
    other = type("Other", (built_in,), {})
    install_plugin(other)
    assert load_plugin_class("qat") is other


def test_it_is_gone_after_the_test() -> None:
    assert "own" not in installed_plugins()
    assert load_plugin_class("qat").__name__ == "QATPlugin"


def test_recording_is_a_new_plugin(recording: RecordingPlugin) -> None:
    prepare_compression(toys.mlp(), [recording])
    assert recording.hooks == ["validate_composition", "prepare_model"]


def test_a_missing_pytest_is_named_together_with_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pytest", None)
    monkeypatch.delitem(sys.modules, "compression_manager.testing")
    with pytest.raises(ModuleNotFoundError, match=r"compression-manager\[testing\]") as error:
        importlib.import_module("compression_manager.testing")
    assert error.value.name == "pytest"


def test_nothing_else_imports_pytest() -> None:
    script = """
import sys
import compression_manager, compression_manager.cli, compression_plugins
for name in compression_plugins.__all__:
    getattr(compression_plugins, name)
assert "pytest" not in sys.modules
assert "compression_manager.testing" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

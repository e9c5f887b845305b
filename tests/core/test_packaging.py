"""The package list of setup.cfg is the tree; a forgotten package is missing from the wheel."""

from __future__ import annotations

import configparser
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = {"compression_manager": "compression", "compression_plugins": "plugins"}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _packages(package: str, source: str) -> set[str]:
    root = ROOT / source
    return {
        ".".join(path.parent.relative_to(root).parts)
        for path in (root / package).rglob("__init__.py")
    }


def test_every_package_is_listed(setup: configparser.ConfigParser) -> None:
    listed = _lines(setup["options"]["packages"])
    expected = set().union(*(_packages(*item) for item in SOURCES.items()))
    assert sorted(listed) == sorted(expected)


def test_every_folder_with_modules_is_a_package() -> None:
    for package, source in SOURCES.items():
        for path in (ROOT / source / package).rglob("*.py"):
            assert (path.parent / "__init__.py").is_file(), path


def test_source_roots(setup: configparser.ConfigParser) -> None:
    pairs = (line.split("=") for line in _lines(setup["options"]["package_dir"]))
    assert {name.strip(): path.strip() for name, path in pairs} == {
        package: f"{source}/{package}" for package, source in SOURCES.items()
    }
    for package, source in SOURCES.items():
        assert not (ROOT / source / "__init__.py").exists()
        assert (ROOT / source / package / "py.typed").is_file()
        assert "py.typed" in setup["options.package_data"][package]


def test_no_init_below_tests() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_every_built_in_entry_point_loads(setup: configparser.ConfigParser) -> None:
    from compression_manager.plugin_host.discovery import load_plugin_class

    entries = _lines(setup["options.entry_points"]["compression_manager.plugins.v1"])
    for line in entries:
        name, value = (part.strip() for part in line.split("="))
        plugin_class = load_plugin_class(name)
        assert value == f"{value.split(':')[0]}:{plugin_class.__name__}"
        assert plugin_class.__module__.startswith(value.split(":")[0])


def test_only_the_plugins_that_take_part_are_imported() -> None:
    script = """
import sys
from compression_manager import prepare_compression
from compression_plugins import QATConfig
from torch import nn
prepare_compression(nn.Linear(2, 2), [QATConfig()])
names = {name.split(".")[1] for name in sys.modules if name.startswith("compression_plugins.")}
assert names == {"fake_quant", "calibration"}, names
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)

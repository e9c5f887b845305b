"""From an entry-point name to a plugin class: only what was named is imported."""

from __future__ import annotations

import importlib
import types
from pathlib import Path
from typing import Any

import pytest

import toys
from compression_manager import ConfigError, Plugin, PluginError, prepare_compression
from compression_manager.plugin_host import discovery
from probes import ProbeConfig


class GoodPlugin(Plugin[ProbeConfig]):
    config_class = ProbeConfig


class OtherConfigPlugin(Plugin[Any]):
    config_class = type("OtherConfig", (ProbeConfig,), {"plugin": "other"})


class NoConfigClassPlugin(Plugin[Any]):
    pass


class NotAConfigPlugin(Plugin[Any]):
    config_class = types.SimpleNamespace(plugin="probe")  # type: ignore[assignment]


def test_only_the_named_plugin_is_imported(install: Any, module: Any) -> None:
    module.Plugin = GoodPlugin
    install(
        ("broken", "no_such_module_at_all:Plugin", "dist-broken"),
        ("probe", "third_party_module:Plugin", "dist-good"),
    )
    manager = prepare_compression(toys.mlp(), [ProbeConfig()])
    assert type(manager._plugins[0]) is GoodPlugin


def test_unknown_name_gets_the_nearest(install: Any) -> None:
    install(("probing", "a:b", "d"))
    with pytest.raises(ConfigError, match=r"no plugin named 'probe'.*did you mean 'probing'"):
        prepare_compression(toys.mlp(), [ProbeConfig()])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("no_such_module_at_all:Plugin", "cannot be imported: ModuleNotFoundError"),
        ("third_party_module:missing", "cannot be imported: AttributeError"),
        ("third_party_module:function", "must be a subclass of compression_manager.Plugin"),
        ("third_party_module:NoClass", "must be a subclass"),
        ("third_party_module:NoConfig", "must set config_class"),
        ("third_party_module:NotAConfig", "must set config_class"),
        ("third_party_module:OtherConfig", "'plugin' is 'probe'"),
    ],
)
def test_broken_plugin_is_named_with_its_distribution(
    install: Any, module: Any, value: str, text: str
) -> None:
    module.function = lambda: None
    module.NoClass = 3
    module.NoConfig = NoConfigClassPlugin
    module.NotAConfig = NotAConfigPlugin
    module.OtherConfig = OtherConfigPlugin
    install(("probe", value, "dist-broken"))
    with pytest.raises(PluginError) as error:
        prepare_compression(toys.mlp(), [ProbeConfig()])
    assert error.value.plugin == "probe"
    assert error.value.hook is None
    for part in (text, "dist-broken", value, "'probe'"):
        assert part in str(error.value)


def test_import_error_is_the_cause(install: Any) -> None:
    install(("probe", "no_such_module_at_all:Plugin", "d"))
    with pytest.raises(PluginError) as error:
        prepare_compression(toys.mlp(), [ProbeConfig()])
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


def test_two_distributions_with_one_name_are_refused(install: Any, module: Any) -> None:
    module.Plugin = GoodPlugin
    install(("probe", "third_party_module:Plugin", "one"), ("probe", "elsewhere:Plugin", "two"))
    with pytest.raises(PluginError, match=r"installed by one 1\.2\).*installed by two 1\.2\)"):
        prepare_compression(toys.mlp(), [ProbeConfig()])
    install(
        ("probe", "third_party_module:Plugin", "one"), ("probe", "third_party_module:Plugin", "x")
    )
    prepare_compression(toys.mlp(), [ProbeConfig()])


def test_config_that_names_another_plugin(install: Any, module: Any) -> None:
    module.Plugin = type("Strict", (Plugin,), {"config_class": type("S", (ProbeConfig,), {})})
    install(("probe", "third_party_module:Plugin", "d"))
    with pytest.raises(ConfigError, match="ProbeConfig names the plugin 'probe', which takes a S"):
        prepare_compression(toys.mlp(), [ProbeConfig()])


def test_failing_constructor_is_named(install: Any, module: Any) -> None:
    def __init__(self: Any, config: Any) -> None:
        raise OSError("no disk")

    module.Plugin = type("Fails", (GoodPlugin,), {"__init__": __init__})
    install(("probe", "third_party_module:Plugin", "d"))
    with pytest.raises(PluginError, match="'mine' cannot be created: OSError: no disk") as error:
        prepare_compression(toys.mlp(), [ProbeConfig(name="mine")])
    assert error.value.plugin == "mine"
    assert isinstance(error.value.__cause__, OSError)


NEWER, UNVERSIONED = "compression_manager.plugins.v2", "compression_manager.plugins"


def test_newer_hook_api_is_refused_without_importing(install: Any) -> None:
    install(("probe", "no_such_module_at_all:Plugin", "dist-new", NEWER))
    with pytest.raises(PluginError) as error:
        prepare_compression(toys.mlp(), [ProbeConfig()])
    assert error.value.plugin == "probe"
    assert error.value.__cause__ is None
    assert str(error.value) == (
        "plugin 'probe' (no_such_module_at_all:Plugin, installed by dist-new 1.2) needs hook API "
        "2, but this compression-manager has hook API 1; upgrade compression-manager, or install "
        "an older release of dist-new 1.2."
    )


def test_older_hook_api_is_refused(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "HOOK_API_VERSION", 2)
    monkeypatch.setattr(discovery, "ENTRY_POINT_GROUP", NEWER)
    install(("probe", "a:b", "dist-old", "compression_manager.plugins.v1"))
    with pytest.raises(PluginError, match=r"needs hook API 1, .* downgrade .* a newer"):
        prepare_compression(toys.mlp(), [ProbeConfig()])


@pytest.mark.parametrize("group", [f"{UNVERSIONED}.1", f"{UNVERSIONED}.v1.1", f"{UNVERSIONED}_v1"])
def test_group_without_a_version_says_which_to_use(install: Any, group: str) -> None:
    install(("probe", "a:b", "dist-odd", group))
    with pytest.raises(PluginError) as error:
        prepare_compression(toys.mlp(), [ProbeConfig()])
    for part in (f"'{group}', which does not say", "dist-odd", "'compression_manager.plugins.v1'"):
        assert part in str(error.value)


def test_the_group_without_a_number_is_that_of_version_1(
    install: Any, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module.Plugin = GoodPlugin
    install(("probe", "third_party_module:Plugin", "d", UNVERSIONED))
    prepare_compression(toys.mlp(), [ProbeConfig()]).close()
    monkeypatch.setattr(discovery, "HOOK_API_VERSION", 2)
    with pytest.raises(PluginError, match="needs hook API 1"):
        prepare_compression(toys.mlp(), [ProbeConfig()])


def test_unusable_groups_do_not_disturb_other_plugins(install: Any, module: Any) -> None:
    module.Plugin = GoodPlugin
    install(
        ("later", "no_such_module_at_all:Plugin", "dist-new", NEWER),
        ("odd", "no_such_module_at_all:Plugin", "dist-odd", f"{UNVERSIONED}.1"),
        ("probe", "third_party_module:Plugin", "dist-good"),
    )
    prepare_compression(toys.mlp(), [ProbeConfig()])


@pytest.mark.parametrize("first", [0, 1])
def test_distribution_may_serve_several_versions(install: Any, module: Any, first: int) -> None:
    module.Plugin = GoodPlugin
    both = [
        ("probe", "no_such_module_at_all:Plugin", "dist-both", NEWER),
        ("probe", "third_party_module:Plugin", "dist-both"),
    ]
    install(both[first], both[1 - first])
    manager = prepare_compression(toys.mlp(), [ProbeConfig()])
    assert type(manager._plugins[0]) is GoodPlugin


def test_a_plugin_that_was_installed_a_moment_ago_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="no plugin named 'probe' is installed"):
        discovery.load_plugin_class("probe")
    module.Plugin = GoodPlugin
    metadata = tmp_path / "late-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: late\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[compression_manager.plugins.v1]\nprobe = third_party_module:Plugin\n"
    )
    importlib.invalidate_caches()
    assert discovery.load_plugin_class("probe") is GoodPlugin

"""Names, roles and default providers of the plugins that are composed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import nn

import toys
from compression_manager import ConfigError, Plugin, prepare_compression
from compression_plugins import CalibrationConfig, DistillationConfig, ProgressConfig, QATConfig
from probes import ProbeConfig, probe


def _names(configs: list[Any]) -> list[str]:
    return [plugin.name for plugin in prepare_compression(toys.mlp(), configs)._plugins]


def _distiller(**options: Any) -> DistillationConfig:
    return DistillationConfig(toys.mlp(), **options)


def test_instances_are_numbered() -> None:
    configs = [_distiller(), ProgressConfig(), _distiller(), _distiller()]
    assert _names(configs) == ["distillation", "progress", "distillation_2", "distillation_3"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_numbers_avoid_names_that_were_given(order: tuple[int, ...]) -> None:
    configs = [_distiller(), _distiller(), _distiller(name="distillation_2")]
    names = _names([configs[index] for index in order])
    assert names[order.index(2)] == "distillation_2"
    assert set(names) == {"distillation", "distillation_2", "distillation_3"}


def test_default_provider_avoids_names_that_were_given() -> None:
    assert _names([QATConfig(name="calibration")]) == ["calibration", "calibration_2"]


def test_same_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="two plugins are named 'soft'"):
        _names([_distiller(name="soft"), ProgressConfig(name="soft")])


def test_one_object_twice_is_refused() -> None:
    plugin = probe()
    with pytest.raises(ConfigError, match="listed twice"):
        _names([plugin, plugin])


def test_one_config_twice_makes_two_instances() -> None:
    config = _distiller()
    assert _names([config, config]) == ["distillation", "distillation_2"]


@pytest.mark.parametrize("configs", [[QATConfig(), QATConfig()], [CalibrationConfig()] * 2])
def test_two_owners_of_a_role_are_refused(configs: list[Any]) -> None:
    with pytest.raises(ConfigError, match=r"both own the role '(fake_quant|calibration)'"):
        _names(configs)


def test_own_role_of_a_third_party() -> None:
    plugins = [probe(name, roles=frozenset({"storage"})) for name in ("a", "b")]
    with pytest.raises(ConfigError, match="'a' and 'b' both own the role 'storage'"):
        _names(plugins)


def test_disabled_is_as_if_it_were_not_listed() -> None:
    assert _names([QATConfig(enabled=False), ProgressConfig()]) == ["progress"]
    assert _names([QATConfig(), CalibrationConfig(enabled=False)]) == ["qat", "calibration"]
    with pytest.raises(ConfigError, match="no plugin is enabled"):
        _names([QATConfig(enabled=False)])


@pytest.mark.parametrize(
    ("configs", "text"),
    [
        ([], "empty"),
        (QATConfig(), "a list of configs"),
        (None, "NoneType"),
        ([3], "got 3"),
        ([nn.Linear(1, 1)], "must be a plugin's config"),
        ([QATConfig], "must be a plugin's config"),
    ],
)
def test_unfit_lists(configs: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        prepare_compression(toys.mlp(), configs)


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ([QATConfig()], ["qat", "calibration"]),
        ([CalibrationConfig(), QATConfig()], ["calibration", "qat"]),
        ([QATConfig(), ProgressConfig()], ["qat", "progress", "calibration"]),
        ([ProgressConfig()], ["progress"]),
    ],
)
def test_default_provider_comes_last_and_only_if_missing(
    configs: list[Any], expected: list[str]
) -> None:
    assert _names(configs) == expected


class _OwnCalibration(Plugin[ProbeConfig]):
    config_class = ProbeConfig
    roles = frozenset({"calibration"})


def test_owner_of_the_providers_role_replaces_it() -> None:
    own = _OwnCalibration(ProbeConfig(name="own"))
    for configs in ([QATConfig(), own], [own, QATConfig()]):
        with pytest.raises(ConfigError, match="no plugin answers make_observer for the weight of"):
            _names(configs)


class _NeedsNothingInstalled(Plugin[ProbeConfig]):
    config_class = ProbeConfig
    default_providers: ClassVar[dict[str, str]] = {"make_observer": "calibratio"}


def test_missing_provider_says_who_needs_it() -> None:
    with pytest.raises(ConfigError, match="did you mean 'calibration'") as error:
        _names([_NeedsNothingInstalled(ProbeConfig(name="asks"))])
    assert "plugin 'asks' needs to answer make_observer" in error.value.__notes__[0]


class _WantsMinMax(Plugin[ProbeConfig]):
    config_class = ProbeConfig
    default_providers: ClassVar[dict[str, str]] = {"make_observer": "calibration"}
    provider_options: ClassVar[dict[str, dict[str, str]]] = {"calibration": {"observer": "min_max"}}


def test_a_plugin_chooses_options_of_its_default_provider() -> None:
    def observer(*listed: Any) -> str:
        manager = prepare_compression(toys.mlp(), list(listed))
        return manager._context.recipe["plugins"]["calibration"]["observer"]

    asking = [_WantsMinMax(ProbeConfig(name=name)) for name in ("first", "second")]
    assert observer(asking[0]) == "min_max"
    assert observer(asking[1], CalibrationConfig()) == CalibrationConfig().observer
    assert observer(QATConfig()) == CalibrationConfig().observer


def test_plugin_takes_its_own_config_only() -> None:
    with pytest.raises(ConfigError, match="_OwnCalibration takes a ProbeConfig, got QATConfig"):
        _OwnCalibration(QATConfig())  # type: ignore[arg-type]


def test_recipe_describes_every_plugin() -> None:
    manager = prepare_compression(toys.mlp(), [QATConfig(), _distiller(name="soft")], seed=3)
    recipe = manager._context.recipe
    assert recipe["seed"] == 3
    assert list(recipe["plugins"]) == ["qat", "soft", "calibration"]
    assert recipe["plugins"]["soft"]["plugin"] == "distillation"
    assert recipe["plugins"]["soft"]["teacher_model"] == "Sequential"


def test_the_recipe_of_a_manager_says_nothing_twice(tmp_path: Path) -> None:
    first = QATConfig()
    manager = prepare_compression(toys.mlp(), [first, ProgressConfig(name="bar")], seed=3)
    recipe = manager.state_dict()["recipe"]
    manager.close()
    assert recipe["seed"] == 3
    assert list(recipe["plugins"]) == ["qat", "bar", "calibration"]
    assert recipe["plugins"]["bar"] == {
        "plugin": "progress",
        "refresh_seconds": 0.2,
        "description": None,
    }
    assert not {"plugin", "name", "enabled"} & set(recipe["plugins"]["qat"])

    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    again = prepare_compression(toys.mlp(), path)
    assert again.state_dict()["recipe"] == recipe
    again.close()

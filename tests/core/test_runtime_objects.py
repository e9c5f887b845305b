"""Live objects reach the plugins of a recipe by option name, or by instance and option."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import toys
from compression_manager import ConfigError, prepare_compression
from compression_plugins import DistillationConfig, QATConfig

TWO = """
plugins:
  first: {plugin: distillation}
  second: {plugin: distillation}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def _teachers(manager: Any) -> dict[str, Any]:
    return {plugin.name: plugin.config.teacher_model for plugin in manager._plugins}


def test_by_option_name_for_every_instance(recipe: Any) -> None:
    teacher = toys.mlp()
    manager = prepare_compression(toys.mlp(), recipe(TWO), teacher_model=teacher)
    assert _teachers(manager) == {"first": teacher, "second": teacher}


@pytest.mark.parametrize("reverse", [False, True])
def test_by_instance_and_option_goes_before_the_option_alone(recipe: Any, reverse: bool) -> None:
    common, own = toys.mlp(), toys.mlp()
    given = {"teacher_model": common, "second.teacher_model": own}
    if reverse:
        given = dict(reversed(given.items()))
    manager = prepare_compression(toys.mlp(), recipe(TWO), **given)
    teachers = _teachers(manager)
    assert teachers["first"] is common
    assert teachers["second"] is own


def test_missing_object_names_the_instance(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"plugins\.first: .*teacher_model=teacher"):
        prepare_compression(toys.mlp(), recipe(TWO), **{"second.teacher_model": toys.mlp()})


@pytest.mark.parametrize("name", ["techer_model", "third.teacher_model", "temperature"])
def test_object_that_nobody_takes(recipe: Any, name: str) -> None:
    given = {"teacher_model": toys.mlp(), name: 3}
    with pytest.raises(ConfigError, match="no plugin takes the argument") as error:
        prepare_compression(toys.mlp(), recipe(TWO), **given)
    assert f"'{name}'" in str(error.value)
    assert "teacher_model" in str(error.value)


@pytest.mark.parametrize(
    ("name", "meant"), [("teacher", "teacher_model"), ("frst.teacher_model", "first.teacher_model")]
)
def test_mistyped_argument_goes_before_what_is_missing_for_it(
    recipe: Any, name: str, meant: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{name}'.*did you mean '{meant}'"):
        prepare_compression(toys.mlp(), recipe(TWO), **{name: toys.mlp()})


def test_recipe_whose_plugins_take_no_objects(recipe: Any) -> None:
    with pytest.raises(ConfigError, match=r"of the plugins listed \(qat\) none takes"):
        prepare_compression(toys.mlp(), recipe("plugins: {qat: {}}"), teacher_model=toys.mlp())


def test_object_of_a_disabled_instance_is_left_over_without_complaint(recipe: Any) -> None:
    text = TWO.replace("second: {", "second: {enabled: false, ") + "  qat: {}\n"
    manager = prepare_compression(toys.mlp(), recipe(text), teacher_model=toys.mlp())
    assert [plugin.name for plugin in manager._plugins] == ["first", "qat", "calibration"]


def test_order_and_names_are_the_recipes(recipe: Any) -> None:
    text = "plugins:\n  progress: {}\n  soft: {plugin: distillation}\n  qat: {}\n"
    manager = prepare_compression(toys.mlp(), recipe(text), teacher_model=toys.mlp())
    assert [plugin.name for plugin in manager._plugins] == [
        "progress",
        "soft",
        "qat",
        "calibration",
    ]


def test_list_takes_no_objects_and_no_overrides() -> None:
    with pytest.raises(ConfigError, match="no argument 'teacher_model'; Valid: example_inputs"):
        prepare_compression(toys.mlp(), [QATConfig()], teacher_model=toys.mlp())
    distillation = DistillationConfig(teacher_outputs="caller")
    with pytest.raises(ConfigError, match=r"belongs into .* DistillationConfig\(teacher_model="):
        prepare_compression(toys.mlp(), [QATConfig(), distillation], teacher_model=toys.mlp())
    with pytest.raises(ConfigError, match="overrides apply to a recipe"):
        prepare_compression(toys.mlp(), [QATConfig()], overrides=["seed=1"])

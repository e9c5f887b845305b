"""Options: documented, fixed, the same from a recipe."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import yaml

from compression_manager.configuration.config import build_config
from compression_manager.configuration.options import describe_options, nested_kinds
from compression_manager.errors import ConfigError
from compression_manager.plugin import PluginConfig
from compression_manager.plugin_host.composition import describe_node
from compression_manager.testing.comparison import differences
from compression_manager.testing.contract.base import ContractRuns, Parts, require, require_none

_OF_EVERY_PLUGIN = {field.name for field in dataclasses.fields(PluginConfig)}


class ConfigurationContract(ContractRuns):
    """Tests of the config class."""

    def test_config_is_a_frozen_dataclass(self) -> None:
        """Options are fields of a class that is a dataclass itself, and do not change."""
        config = self._build("run").config
        kind = type(config)
        require(
            isinstance(config, PluginConfig) and "__dataclass_fields__" in vars(kind),
            f"{kind.__name__} is no config: it must derive from PluginConfig and have "
            "@dataclass(frozen=True) itself, or its options are those of its base class.",
        )
        with suppress(dataclasses.FrozenInstanceError):
            setattr(config, "enabled", False)
            raise AssertionError(
                f"{kind.__name__} lets options be changed after its checks; decorate it with "
                "@dataclass(frozen=True) and leave __setattr__ alone."
            )

    def test_every_option_has_help(self) -> None:
        """The command line and the reference show a line for each option."""
        kind = type(self._build("run").config)
        missing = [
            f"{owner.__name__}.{option.name}"
            for owner in (kind, *nested_kinds([kind]))
            for option in describe_options(owner)
            if not option.help.strip()
        ]
        require_none(
            missing,
            'these options have no help; give each field(..., metadata=option("One line.")):',
        )

    def test_unknown_options_are_refused(self) -> None:
        """A misspelt option is an error that names the nearest one, in Python and in a recipe."""
        config = self._build("run").config
        kind: type[Any] = type(config)
        own = [f.name for f in dataclasses.fields(kind) if not f.metadata.get("runtime")]
        name = next((item for item in own if item not in _OF_EVERY_PLUGIN), "enabled")
        misspelt = f"{name}x"
        given: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(kind)}
        with suppress(TypeError, ConfigError):
            kind(**given, **{misspelt: 1})
            raise AssertionError(
                f"{kind.__name__}({misspelt}=...) is taken without a word; leave __init__ to the "
                "dataclass, so that unknown options are refused."
            )
        message = ""
        try:
            where = f"plugins.{kind.plugin}"
            build_config(kind, {misspelt: 1}, path=where, source="recipe.yaml", runtime={})
        except ConfigError as error:
            message = str(error)
        require(
            f"'{name}'" in message,
            f"the error for '{misspelt}' in a recipe must name '{name}', the nearest option; it "
            f"is: {message or 'none'}",
        )

    def test_recipe_gives_the_same_plugin(self) -> None:
        """Options written into a recipe and read again train the model to the same bits."""
        expected = self._start("recipe")
        own = expected.manager.state_dict()["recipe"]["plugins"]
        expected.train()
        parts = self._build("recipe again")
        path = self.folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(_recipe(parts), sort_keys=False), encoding="utf-8")
        try:
            run = self._prepare(parts, path, **_live_objects(parts))
        except ConfigError as error:
            raise AssertionError(
                f"the config cannot be read back from a recipe: {error}\nMake options numbers, "
                "texts, lists, mappings or dataclasses of these, and mark live objects with "
                "option(..., runtime=True)."
            ) from error
        again = run.manager.state_dict()["recipe"]["plugins"]
        require_none(
            differences(_comparable(again, self.folder.name), _comparable(own, "recipe")),
            "options that were read back from a recipe are others:",
        )
        run.train()
        require_none(
            differences(run.result(), expected.result()),
            "a plugin configured by a recipe trains otherwise than with the same config in "
            "Python; an option probably changes its type on the way:",
        )


def _recipe(parts: Parts) -> dict[str, Any]:
    return {
        "plugins": {
            _instance(config): describe_node(_instance(config), config, live_objects=False)
            for config in parts.configs
        }
    }


def _live_objects(parts: Parts) -> dict[str, Any]:
    return {
        f"{_instance(config)}.{item.name}": getattr(config, item.name)
        for config in parts.configs
        for item in dataclasses.fields(config)
        if item.metadata.get("runtime") and getattr(config, item.name) is not None
    }


def _instance(config: PluginConfig) -> str:
    return config.name or config.plugin


def _comparable(value: Any, folder: str) -> Any:
    """Return options in which the run's folder has one name, and 4 and 4.0 are one number.

    A recipe gives an option of type float a float; in Python users write `temperature=4`.
    """
    if isinstance(value, dict):
        return {key: _comparable(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [_comparable(item, folder) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value.replace(f"/{folder}/", "/run/") if isinstance(value, str) else value

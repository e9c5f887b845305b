"""What `prepare_compression` would say about a recipe, without a model and live objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compression_manager.configuration.config import MissingObject
from compression_manager.configuration.recipe import load_recipe
from compression_manager.errors import CompressionError, MissingObjectError, PluginError
from compression_manager.plugin import Plugin
from compression_manager.plugin_host.composition import complete, configs_from_recipe, describe_node
from compression_manager.plugin_host.discovery import create_plugin
from compression_manager.plugin_host.loading import required_hooks


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe without mistakes.

    Attributes:
        resolved: the whole configuration in the shape of a recipe: overrides applied, every
            option with its value, default providers added, without plugins that are not enabled.
        notes: what is still to be given to `prepare_compression`, and what could not be checked
            without it.
    """

    resolved: dict[str, Any]
    notes: tuple[str, ...]


def check_recipe(path: str | Path, overrides: Sequence[str] = ()) -> CheckedRecipe:
    """Check a recipe as `prepare_compression` would before it looks at the model.

    Args:
        path: YAML file.
        overrides: dotted assignments that come last.

    Raises:
        ConfigError: the recipe is invalid; the message names file and key path.
        PluginError: a plugin that it lists cannot be loaded.
    """
    recipe = load_recipe(path, overrides)
    missing: dict[str, list[MissingObject]] = {}
    configs = configs_from_recipe(recipe, {}, missing)
    notes = [_note(item) for items in missing.values() for item in items]
    plugins: list[Plugin[Any]] = []
    with _naming_file(recipe.source):
        for instance, (plugin_class, config) in configs.items():
            try:
                plugins.append(create_plugin(plugin_class, config))
            except (MissingObjectError, PluginError) as error:
                # A constructor may use its live object at once.
                if not missing[instance] and not isinstance(error, MissingObjectError):
                    raise
                notes.append(f"plugins.{instance}: not checked together with the other plugins")
        if plugins or not configs:
            plugins = complete(plugins)
        required_hooks([plugin for plugin in plugins if not missing.get(plugin.name)])
    described = {instance: config for instance, (_, config) in configs.items()}
    described |= {plugin.name: plugin.config for plugin in plugins}
    nodes = {
        instance: describe_node(instance, config, live_objects=False)
        for instance, config in described.items()
    }
    return CheckedRecipe({"seed": recipe.seed, "plugins": nodes}, tuple(notes))


@contextmanager
def _naming_file(source: str) -> Iterator[None]:
    try:
        yield
    except CompressionError as error:
        error.args = (f"{source}: {error}", *error.args[1:])
        raise


def _note(item: MissingObject) -> str:
    place, _, option = item.key_path.rpartition(".")
    text = f"{item.key_path}: to be passed to prepare_compression(..., {option}=...)"
    if item.blocks_checks:
        text += f"; without it only the types of the options in {place} can be checked"
    return text

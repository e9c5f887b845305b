"""From the user's list or recipe to plugin instances that fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from compression_manager.configuration.config import MissingObject, build_config
from compression_manager.configuration.description import describe_config
from compression_manager.configuration.recipe import Recipe, load_recipe
from compression_manager.errors import CompressionError, ConfigError, suggest
from compression_manager.plugin import Plugin, PluginConfig
from compression_manager.plugin_host.discovery import create_plugin, load_plugin_class
from compression_manager.plugin_host.loading import implemented_hooks

PluginSpec = PluginConfig | Plugin[Any]


def plugins_from_list(items: Sequence[PluginSpec]) -> list[Plugin[Any]]:
    """Return one plugin per item; an item is a config, or a plugin built by the caller.

    Raises:
        ConfigError: the list is empty or holds something else.
    """
    if isinstance(items, (PluginConfig, Plugin)) or not isinstance(items, Sequence):
        raise ConfigError(
            "prepare_compression takes a list of configs, for example "
            f"[QATConfig()], or the path of a recipe; got {type(items).__name__}."
        )
    if not items:
        raise ConfigError(
            "the list of configs is empty; name at least one plugin, for example [QATConfig()]."
        )
    return [_plugin_from_item(item) for item in items]


def plugins_from_recipe(
    path: str | Path, overrides: Sequence[str], runtime_objects: Mapping[str, Any]
) -> tuple[list[Plugin[Any]], int | None]:
    """Return the recipe's plugins in its order, and its seed.

    Args:
        path: YAML file.
        overrides: dotted assignments, for example `plugins.qat.weight.bits=4`.
        runtime_objects: option name -> live object, for every plugin that has the option; or
            `instance.option` -> live object for one instance.

    Raises:
        ConfigError: names file and key path.
    """
    recipe = load_recipe(path, overrides)
    configs = configs_from_recipe(recipe, runtime_objects)
    plugins = [create_plugin(plugin_class, config) for plugin_class, config in configs.values()]
    return plugins, recipe.seed


def configs_from_recipe(
    recipe: Recipe,
    runtime_objects: Mapping[str, Any],
    missing: dict[str, list[MissingObject]] | None = None,
) -> dict[str, tuple[type[Plugin[Any]], PluginConfig]]:
    """Return instance name -> class and config of every plugin that is enabled, in order.

    Args:
        recipe: as it was read.
        runtime_objects: as for `plugins_from_recipe`.
        missing: takes the live objects that each instance lacks; None: they are an error.

    Raises:
        ConfigError: names file and key path.
    """
    classes = {
        instance: _load_listed(instance, node, recipe.source)
        for instance, node in recipe.plugins.items()
    }
    # Before the configs: a mistyped argument often is what a config then lacks.
    _refuse_unknown_arguments(set(runtime_objects), classes, recipe.source)
    configs: dict[str, tuple[type[Plugin[Any]], PluginConfig]] = {}
    for instance, node in recipe.plugins.items():
        if node.get("enabled") is False:
            continue
        config_class = classes[instance].config_class
        config = build_config(
            config_class,
            {"name": instance, **{key: value for key, value in node.items() if key != "plugin"}},
            path=f"plugins.{instance}",
            source=recipe.source,
            runtime={
                option: runtime_objects[key]
                for option in _runtime_options(config_class)
                for key in (option, f"{instance}.{option}")
                if key in runtime_objects
            },
            missing=None if missing is None else missing.setdefault(instance, []),
        )
        configs[instance] = (classes[instance], config)
    return configs


def refuse_runtime_objects(names: set[str], items: object) -> None:
    """Raise ConfigError for keyword arguments beside a list of configs, which holds the objects."""
    if not names:
        return
    name = sorted(names)[0]
    option = name.rpartition(".")[2]
    owners = [
        type(item).__name__
        for item in (items if isinstance(items, Sequence) else ())
        if isinstance(item, PluginConfig) and option in _runtime_options(type(item))
    ]
    if owners:
        raise ConfigError(
            f"'{name}' is passed to prepare_compression only together with a recipe; here it "
            f"belongs into the config: {owners[0]}({option}=...)."
        )
    raise ConfigError(
        f"prepare_compression has no argument '{name}'; "
        f"{suggest(name, ('overrides', 'example_inputs', 'seed'))}"
    )


def _load_listed(instance: str, node: Mapping[str, Any], source: str) -> type[Plugin[Any]]:
    try:
        return load_plugin_class(node.get("plugin", instance))
    except ConfigError as error:
        own_key = "" if "plugin" in node else " Below a key of your own, write 'plugin: NAME'."
        raise ConfigError(f"{source}: plugins.{instance}: {error}{own_key}") from error


def _refuse_unknown_arguments(
    names: set[str], classes: Mapping[str, type[Plugin[Any]]], source: str
) -> None:
    """Raise ConfigError if a keyword argument belongs to no plugin of the recipe."""
    options = {
        instance: _runtime_options(plugin_class.config_class)
        for instance, plugin_class in classes.items()
    }
    valid = {option for known in options.values() for option in known}
    valid |= {f"{instance}.{option}" for instance, known in options.items() for option in known}
    for name in sorted(names - valid):
        problem = f"{source}: no plugin takes the argument '{name}' of prepare_compression"
        if valid:
            raise ConfigError(f"{problem}; {suggest(name, valid)}")
        raise ConfigError(
            f"{problem}; of the plugins listed ({', '.join(classes)}) none takes a live object."
        )


def complete(plugins: list[Plugin[Any]]) -> list[Plugin[Any]]:
    """Return the plugins with unique names, followed by default providers that are missing.

    Raises:
        ConfigError: no plugin is enabled, or two have the same name or own the same role.
    """
    completed = [plugin for plugin in plugins if plugin.config.enabled]
    if not completed:
        raise ConfigError("no plugin is enabled; name at least one, for example [QATConfig()].")
    # The list grows while it is walked: a provider may itself declare providers.
    for plugin in completed:
        for service, provider in plugin.default_providers.items():
            if all(other.config.plugin != provider for other in completed):
                _add_provider(completed, plugin, service, provider)
    _name_uniquely(completed)
    _check_roles(completed)
    for plugin in completed:
        implemented_hooks(plugin)
    return completed


def describe(plugins: Sequence[Plugin[Any]], seed: int | None) -> dict[str, Any]:
    """Return the whole configuration as plain values, in the shape of a recipe."""
    return {
        "seed": seed,
        "plugins": {plugin.name: describe_node(plugin.name, plugin.config) for plugin in plugins},
    }


def describe_node(
    instance: str, config: PluginConfig, *, live_objects: bool = True
) -> dict[str, Any]:
    """Return the options; what the place in the recipe says already is left out."""
    options = describe_config(config, live_objects=live_objects)
    del options["name"], options["enabled"]
    return options if instance == config.plugin else {"plugin": config.plugin, **options}


def _plugin_from_item(item: object) -> Plugin[Any]:
    if isinstance(item, Plugin):
        return item
    if not isinstance(item, PluginConfig):
        raise ConfigError(
            f"each item of the list must be a plugin's config, for example QATConfig(), "
            f"got {item!r}."
        )
    plugin_class = load_plugin_class(item.plugin)
    if not isinstance(item, plugin_class.config_class):
        raise ConfigError(
            f"{type(item).__name__} names the plugin '{item.plugin}', which takes a "
            f"{plugin_class.config_class.__name__}."
        )
    return create_plugin(plugin_class, item)


def _add_provider(
    plugins: list[Plugin[Any]], asking: Plugin[Any], service: str, provider: str
) -> None:
    """Append the default provider, unless a listed plugin owns its role."""
    try:
        provider_class = load_plugin_class(provider)
        roles = provider_class.roles
        if not any(roles & plugin.roles for plugin in plugins):
            options = asking.provider_options.get(provider, {})
            plugins.append(create_plugin(provider_class, provider_class.config_class(**options)))
    except CompressionError as error:
        error.add_note(f"'{provider}' is what plugin '{asking.name}' needs to answer {service}")
        raise


def _runtime_options(config_class: type[PluginConfig]) -> set[str]:
    return {field.name for field in dataclass_fields(config_class) if field.metadata.get("runtime")}


def _name_uniquely(plugins: Sequence[Plugin[Any]]) -> None:
    """Number the plugins that the user did not name; they avoid the names that were given."""
    if len({id(plugin) for plugin in plugins}) < len(plugins):
        raise ConfigError("one plugin object is listed twice; build an object for each place.")
    taken: set[str] = set()
    for plugin in plugins:
        if plugin.config.name is not None:
            if plugin.name in taken:
                raise ConfigError(
                    f"two plugins are named '{plugin.name}'; give each its own name=... "
                    f"Taken: {', '.join(sorted(taken))}."
                )
            taken.add(plugin.name)
    for plugin in plugins:
        if plugin.config.name is None:
            base, number = plugin.config.plugin, 2
            plugin.name = base
            while plugin.name in taken:
                plugin.name = f"{base}_{number}"
                number += 1
            taken.add(plugin.name)


def _check_roles(plugins: Sequence[Plugin[Any]]) -> None:
    owners: dict[str, str] = {}
    for plugin in plugins:
        for role in plugin.roles:
            if role in owners:
                raise ConfigError(
                    f"plugins '{owners[role]}' and '{plugin.name}' both own the role '{role}'; "
                    "list only one of them."
                )
            owners[role] = plugin.name

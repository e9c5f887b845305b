"""Reading a recipe: YAML file, then overrides, then interpolations, into plain containers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compression_manager.configuration.checks import MAX_SEED, is_seed
from compression_manager.configuration.yaml_limits import check_limits
from compression_manager.errors import ConfigError, suggest

_ROOT_KEYS = ("plugins", "seed")
_SUFFIXES = {".yaml", ".yml"}
_UNREADABLE = (OmegaConfBaseException, yaml.YAMLError, RecursionError, ValueError, OSError)


@dataclass(frozen=True)
class Recipe:
    """What a recipe file says, after overrides, as plain dicts, lists, numbers and strings.

    Attributes:
        seed: seed for all random generators, or None.
        plugins: instance name -> options, in the order in which plugins run. Options may hold
            `plugin`, the registered name, when the instance has a name of its own.
        source: the file, and the overrides if there are any, for error messages.
    """

    seed: int | None
    plugins: Mapping[str, Mapping[str, Any]]
    source: str


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        path: YAML file with the keys `plugins` and, optionally, `seed`.
        overrides: dotted assignments that come last, for example
            `plugins.distillation.criterion.temperature=4`; list items are `key[0]`.

    Raises:
        ConfigError: the file cannot be read, is no valid recipe, or an override is malformed or
            names a plugin that the recipe does not list; the message names file and key path.
    """
    tree = _read(path)
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of texts; write [{overrides!r}].")
    if not isinstance(overrides, Sequence):
        raise ConfigError(f"overrides must be a list of texts, got {overrides!r}.")
    for override in overrides:
        _apply_override(tree, override, str(path))
    source = f"{path} (with overrides {', '.join(overrides)})" if overrides else str(path)
    try:
        root = OmegaConf.to_container(tree, resolve=True, throw_on_missing=True)
    except _UNREADABLE as error:
        _refuse(source, error)
    return _check_root(root, source)


def _read(path: str | Path) -> DictConfig:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"recipe file {path} does not exist.{_files_beside(path)}") from error
    except _UNREADABLE as error:
        raise ConfigError(f"recipe file {path} cannot be read: {error}.") from error
    try:
        check_limits(text)
        tree = OmegaConf.load(io.StringIO(text))
    except _UNREADABLE as error:
        _refuse(str(path), error)
    if not isinstance(tree, DictConfig):
        raise ConfigError(
            f"{path}: a recipe is a mapping with the keys {' and '.join(_ROOT_KEYS)}, "
            f"for example 'plugins: {{qat: {{}}}}'."
        )
    return tree


def _files_beside(path: str | Path) -> str:
    try:
        names = [item.name for item in Path(path).parent.iterdir() if item.suffix in _SUFFIXES]
    except OSError:
        return f" Neither does the folder {Path(path).parent}."
    return f" Recipes beside it: {suggest(Path(path).name, names)}" if names else ""


def _apply_override(tree: DictConfig, override: object, source: str) -> None:
    if not isinstance(override, str) or "=" not in override:
        raise _override_error(override, "write key.path=value.")
    key, value = (part.strip() for part in override.split("=", 1))
    parts = key.split(".")
    if not all(parts) or key.count("[") != key.count("]"):
        raise _override_error(override, f"'{key}' is no key path such as plugins.qat.skip[0].")
    if parts[0] not in _ROOT_KEYS:
        raise _override_error(
            override, f"unknown key '{parts[0]}'; {suggest(parts[0], _ROOT_KEYS)}"
        )
    try:
        check_limits(value)
        listed = tree.get("plugins") or {}
        if len(parts) > 2 and parts[1] not in listed:
            raise _override_error(
                override,
                f"{source} lists no plugin '{parts[1]}'; {suggest(parts[1], map(str, listed))} "
                "Another installed one is added by plugins.NAME={} in front of it.",
            )
        if len(parts) == 2 and parts[0] == "plugins" and yaml.safe_load(value) is None:
            # In a file, a plugin without options; here it looks like one that is turned off.
            is_listed = parts[1] in listed
            hint = f"{key}.enabled=false turns it off" if is_listed else f"write {key}={{}}"
            raise _override_error(override, f"a plugin is not null; {hint}.")
        tree.merge_with_dotlist([f"{key}={value}"])
    except (*_UNREADABLE, AttributeError, LookupError, TypeError) as error:
        reason = f"it does not fit {source}: {_one_line(error)}."
        raise _override_error(override, reason) from error


def _override_error(override: object, reason: str) -> ConfigError:
    return ConfigError(f"override {override!r} cannot be applied: {reason}")


def _check_root(root: Any, source: str) -> Recipe:
    for key in root:
        if key not in _ROOT_KEYS:
            hint = "" if "plugins" in root else " Plugins are listed below 'plugins'."
            raise ConfigError(
                f"{source}: unknown key '{key}'; {suggest(str(key), _ROOT_KEYS)}{hint}"
            )
    nodes = root.get("plugins")
    if not isinstance(nodes, dict) or not nodes:
        raise ConfigError(
            f"{source}: plugins must be a mapping of at least one plugin name to its options, "
            f"for example 'plugins: {{qat: {{}}}}'; got {nodes!r}."
        )
    plugins = {name: _check_node(name, node, source) for name, node in nodes.items()}
    return Recipe(seed=_check_seed(root.get("seed"), source), plugins=plugins, source=source)


def _check_node(name: Any, node: Any, source: str) -> dict[str, Any]:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{source}: plugins: the name of a plugin must be a text, got {name!r}.")
    options = {} if node is None else node
    if not isinstance(options, dict):
        raise ConfigError(f"{source}: plugins.{name}: expected a mapping of options, got {node!r}.")
    if not isinstance(options.get("plugin", name), str):
        raise ConfigError(
            f"{source}: plugins.{name}.plugin: expected the name of a plugin, "
            f"got {options['plugin']!r}."
        )
    return options


def _check_seed(seed: Any, source: str) -> int | None:
    if seed is None:
        return None
    if not is_seed(seed):
        raise ConfigError(
            f"{source}: seed: expected an integer from 0 to {MAX_SEED}, got {seed!r}."
        )
    return seed


def _refuse(source: str, error: Exception) -> NoReturn:
    key = getattr(error, "full_key", None)
    where = f"{source}: {key}" if key else source
    raise ConfigError(f"{where}: {_one_line(error)}.") from error


def _one_line(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None)
    if mark is not None and problem is not None:
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def flat_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted key -> number, text or bool; lists, None and empty mappings as JSON."""
    return dict(_flatten(recipe, ""))


def _flatten(node: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{name}.")
        elif isinstance(value, (bool, int, float, str)):
            yield name, value
        else:
            yield name, json.dumps(value, default=str)

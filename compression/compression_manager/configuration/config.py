"""Config dataclasses from plain recipe nodes; `config_description` goes the way back.

Frozen dataclasses are built field by field from their own type hints, so that every error names
file and key path. Options that a node leaves out keep their defaults, in nested dataclasses
those of the field's own default. A class whose options exclude one another sets
`replaces_default: ClassVar[bool] = True` and starts from nothing; one in which an option only has
a meaning together with another's value sets `depends_on: ClassVar[dict[str, str]]`, and the
inherited value lapses when the other option is given.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass
from typing import Any, TypeVar

from compression_manager.configuration.fields import (
    container_of,
    default_of,
    help_of,
    init_fields,
    is_required,
    is_structure,
    show_declared,
    type_hints,
    union_members,
)
from compression_manager.configuration.values import convert_scalar, show_value
from compression_manager.errors import CompressionError, ConfigError, MissingObjectError, suggest
from compression_manager.plugin import PluginConfig

ConfigType = TypeVar("ConfigType", bound=PluginConfig)
Registry = Mapping[str, type]


@dataclass(frozen=True)
class MissingObject:
    """A live object that options need and that was not given.

    Attributes:
        key_path: of the option that takes it, for example `plugins.distillation.teacher_model`.
        blocks_checks: whether the options beside it could not be checked without it.
    """

    key_path: str
    blocks_checks: bool


def build_config(
    config_class: type[ConfigType],
    node: Mapping[str, Any],
    *,
    path: str,
    source: str,
    runtime: Mapping[str, Any],
    missing: list[MissingObject] | None = None,
) -> ConfigType:
    """Construct a config from its node of a recipe.

    Args:
        config_class: frozen dataclass. A field whose metadata has `registry` (name -> dataclass)
            takes a node `{type: name, ...}`, and a text if its type hint has `str`; one with
            `runtime` is taken from `runtime`.
        node: plain containers.
        path: key path of the node, for example `plugins.distillation`.
        source: file, for error messages.
        runtime: option name -> live object.
        missing: takes the live objects that are missing; the config then holds the options that
            were given and is good for nothing but to be described. None: they are an error.

    Raises:
        MissingObjectError: a live object is missing, and `missing` is None.
        ConfigError: an unknown, missing or ill-typed option, or one that `__post_init__` refuses.
    """
    built = _build(config_class, node, _Place(source, path, runtime, missing), base=None)
    return typing.cast(ConfigType, built)


@dataclass(frozen=True)
class _Place:
    """Where a node stands, and the live objects that its fields may need."""

    source: str
    path: str
    runtime: Mapping[str, Any]
    missing: list[MissingObject] | None

    def __truediv__(self, key: object) -> _Place:
        return dataclasses.replace(self, path=f"{self.path}.{key}")

    def item(self, index: int) -> _Place:
        return dataclasses.replace(self, path=f"{self.path}[{index}]")

    def __str__(self) -> str:
        return f"{self.source}: {self.path}"


def _build(config_class: type, node: Any, place: _Place, base: Any) -> Any:
    """Return an instance of `config_class`; what `node` leaves out is taken from `base`."""
    if not isinstance(node, Mapping):
        raise ConfigError(f"{place}: expected a mapping of options, got {show_value(node)}.")
    fields = init_fields(config_class)
    for key in node:
        if key not in {field.name for field in fields}:
            valid = [field.name for field in fields if not field.metadata.get("runtime")]
            raise ConfigError(f"{place / key}: unknown option; {suggest(str(key), valid)}")
    hints = type_hints(config_class, place)
    values: dict[str, Any] = {}
    for field in fields:
        if field.metadata.get("runtime"):
            _take_runtime(values, field, node, place)
        elif field.name in node:
            inherited = default_of(field) if base is None else getattr(base, field.name)
            registry = field.metadata.get("registry")
            conversion = _Conversion(place / field.name, registry, inherited)
            values[field.name] = conversion.convert(hints[field.name], node[field.name])
        elif base is None and is_required(field):
            raise ConfigError(f"{place / field.name} is required: {help_of(field)}")
    for name, other in getattr(config_class, "depends_on", {}).items():
        if other in node and name not in node:
            values[name] = next(default_of(field) for field in fields if field.name == name)
    return _construct(config_class, values, place, base)


def _take_runtime(
    values: dict[str, Any], field: Field[Any], node: Mapping[str, Any], place: _Place
) -> None:
    if field.name in node:
        raise ConfigError(
            f"{place / field.name} is a live object, which a recipe cannot hold; pass it as a "
            f"keyword argument: prepare_compression(model, recipe, {field.name}=...)."
        )
    if field.name in place.runtime:
        values[field.name] = place.runtime[field.name]
    elif is_required(field):
        if place.missing is None:
            raise MissingObjectError(
                f"{place} needs the keyword argument prepare_compression(model, recipe, "
                f"{field.name}=...): {help_of(field)}",
                option=field.name,
            )
        place.missing.append(MissingObject(f"{place.path}.{field.name}", blocks_checks=True))


def _construct(config_class: type[Any], values: dict[str, Any], place: _Place, base: Any) -> Any:
    if base is not None:
        values = {
            **{field.name: getattr(base, field.name) for field in init_fields(config_class)},
            **values,
        }
    lacks = any(
        is_required(field) and field.name not in values for field in init_fields(config_class)
    )
    try:
        # Made in two steps, so that what a missing object leaves unfinished can be described.
        config = object.__new__(config_class)
        if lacks:
            _fill_unchecked(config, values)
        else:
            type(config).__init__(config, **values)
    except MissingObjectError as error:
        if place.missing is None:
            _put_before(error, place)
            raise
        place.missing.append(MissingObject(f"{place.path}.{error.option}", blocks_checks=False))
    except CompressionError as error:
        _put_before(error, place)
        raise
    except Exception as error:
        raise ConfigError(
            f"{place}: {config_class.__name__} refuses these options: "
            f"{type(error).__name__}: {error}"
        ) from error
    return config


def _fill_unchecked(config: Any, values: Mapping[str, Any]) -> None:
    for field in init_fields(type(config)):
        if field.name in values or not is_required(field):
            object.__setattr__(config, field.name, values.get(field.name, default_of(field)))


def _put_before(error: CompressionError, place: _Place) -> None:
    error.args = (f"{place}: {error}", *error.args[1:])


@dataclass(frozen=True)
class _Conversion:
    """Converts the node of one field, or of one item of it."""

    place: _Place
    registry: Registry | None
    inherited: Any = None

    def convert(self, hint: Any, node: Any) -> Any:
        members = union_members(hint)
        if node is None and types.NoneType in members:
            return None
        if isinstance(node, str) and str in members:
            return node
        scalars = [
            member
            for member in members
            if not is_structure(member) and not self._is_registered(member)
        ]
        others = [member for member in scalars if member is not types.NoneType]
        for member in members:
            if container_of(member) is not None:
                if isinstance(node, _NODE_OF[container_of(member)]):
                    return self._container(member, node)
            elif self._is_registered(member) and (isinstance(node, Mapping) or not others):
                return self._registered(node)
            elif dataclasses.is_dataclass(member) and isinstance(node, Mapping):
                return self._dataclass(typing.cast(type, member), node)
            elif member in (Any, object):
                return node
        expected = " or ".join(show_declared(member) for member in members)
        return convert_scalar(scalars, node, str(self.place), expected)

    def _is_registered(self, member: Any) -> bool:
        """Return whether some class of the registry is a `member`."""
        registered = (self.registry or {}).values()
        return isinstance(member, type) and any(issubclass(kind, member) for kind in registered)

    def _container(self, hint: Any, node: Any) -> Any:
        kind, arguments = container_of(hint), typing.get_args(hint)
        if kind is dict:
            value_hint = arguments[1] if arguments else Any
            return {
                self._check_key(key): self._at(self.place / key).convert(value_hint, item)
                for key, item in node.items()
            }
        fixed = typing.get_origin(hint) is tuple and arguments[-1] is not Ellipsis
        if fixed and len(node) != len(arguments):
            raise ConfigError(
                f"{self.place}: expected a list of {len(arguments)} items, got {show_value(node)}."
            )
        hints = arguments if fixed else (arguments[:1] or (Any,)) * len(node)
        items = (
            self._at(self.place.item(index)).convert(item_hint, item)
            for index, (item_hint, item) in enumerate(zip(hints, node, strict=True))
        )
        return list(items) if kind is list else tuple(items)

    def _registered(self, node: Any) -> Any:
        registry = typing.cast(Registry, self.registry)
        names = {config_class: name for name, config_class in registry.items()}
        if not isinstance(node, Mapping):
            raise ConfigError(
                f"{self.place}: expected a mapping such as {{type: {next(iter(registry))}}}, got "
                f"{show_value(node)}; types: {', '.join(registry)}."
            )
        name = node.get("type", names.get(type(self.inherited)))
        if not isinstance(name, str) or name not in registry:
            problem = "type is missing" if name is None else f"unknown type {show_value(name)}"
            raise ConfigError(f"{self.place}.type: {problem}; {suggest(str(name), registry)}")
        options = {key: item for key, item in node.items() if key != "type"}
        return self._dataclass(registry[name], options)

    def _dataclass(self, config_class: type, node: Any) -> Any:
        inherits = type(self.inherited) is config_class
        if getattr(config_class, "replaces_default", False):
            inherits = False
        return _build(config_class, node, self.place, self.inherited if inherits else None)

    def _at(self, place: _Place) -> _Conversion:
        return _Conversion(place, self.registry)

    def _check_key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise ConfigError(f"{self.place}: names must be texts, got {show_value(key)}.")
        return key


_NODE_OF: dict[type | None, type] = {dict: dict, list: list, tuple: list}

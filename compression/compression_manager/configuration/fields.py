"""What a config class declares: its fields, their types, defaults and help."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from enum import Enum
from typing import Any

from compression_manager.configuration.values import show_type
from compression_manager.errors import ConfigError


def init_fields(config_class: type) -> list[Field[Any]]:
    """Return the fields that are options."""
    return [field for field in dataclasses.fields(config_class) if field.init]


def type_hints(config_class: type, place: object) -> dict[str, Any]:
    """Return name -> type of every field; an error of theirs is raised for `place`."""
    try:
        return typing.get_type_hints(config_class)
    except NameError as error:
        raise ConfigError(
            f"{place}: the type hints of {config_class.__name__} cannot be resolved ({error}); "
            "import the names that they use outside of TYPE_CHECKING."
        ) from error


def union_members(hint: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if is_union else [hint]


def container_of(hint: Any) -> type | None:
    """Return the class that holds a value of type `hint`, or None for what is no container."""
    origin = typing.get_origin(hint) or hint
    if not isinstance(origin, type) or origin is object or issubclass(origin, (str, bytes, Enum)):
        return None
    if origin is list:
        return list
    if issubclass(origin, Mapping):
        return dict
    return tuple if issubclass(origin, Sequence) else None


def is_structure(hint: Any) -> bool:
    """Return whether a value of the type has parts of its own in a recipe."""
    return container_of(hint) is not None or dataclasses.is_dataclass(hint)


def show_declared(hint: Any) -> str:
    """Return in words what a recipe may hold for the type."""
    kind = container_of(hint)
    if kind is not None:
        return "a mapping" if kind is dict else "a list"
    return "a mapping of options" if dataclasses.is_dataclass(hint) else show_type(hint)


def default_of(field: Field[Any]) -> Any:
    """Return a new default value, or None where there is none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return None if field.default is MISSING else field.default


def is_required(field: Field[Any]) -> bool:
    """Return whether a recipe must have the option."""
    return field.default is MISSING and field.default_factory is MISSING


def help_of(field: Field[Any]) -> str:
    """Return the option's help text."""
    return str(field.metadata.get("help", "it has no default."))

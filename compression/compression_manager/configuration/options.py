"""What a config class's options are, for the reference pages and the command line."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from typing import Any


@dataclass(frozen=True)
class OptionDescription:
    """One option of a config class.

    Attributes:
        name: of the field.
        type_name: its type hint, for example `int | None`.
        default: as Python writes it; "required" if there is none.
        help: one line for users.
        is_live_object: it is an argument of `prepare_compression`, not part of a recipe.
        kinds: dataclasses whose options a value may have; class -> name that a recipe gives as
            `type`, or None where the class is not chosen by name.
    """

    name: str
    type_name: str
    default: str
    help: str
    is_live_object: bool
    kinds: Mapping[type, str | None]


def describe_options(config_class: type) -> list[OptionDescription]:
    """Return the options of a config dataclass, in the order of its fields.

    Raises:
        NameError: its type hints cannot be resolved.
    """
    hints = typing.get_type_hints(config_class)
    return [_describe(field, hints[field.name]) for field in dataclasses.fields(config_class)]


def nested_kinds(config_classes: Iterable[type]) -> dict[type, str | None]:
    """Return the dataclasses that values of options may be, and those of their options.

    Each has the name that a recipe gives as `type`, or None.
    """
    found: dict[type, str | None] = {}
    for config_class in config_classes:
        _add_kinds(config_class, found)
    # Describing one kind may add further ones.
    described: set[type] = set()
    while remaining := [kind for kind in found if kind not in described]:
        described.add(remaining[0])
        _add_kinds(remaining[0], found)
    return found


def _add_kinds(config_class: type, found: dict[type, str | None]) -> None:
    for option in describe_options(config_class):
        for kind, name in option.kinds.items():
            if found.get(kind) is None:
                found[kind] = name


def _describe(field: Field[Any], hint: Any) -> OptionDescription:
    registry: Mapping[str, type] | None = field.metadata.get("registry")
    kinds: dict[type, str | None]
    if registry is None:
        kinds = dict.fromkeys(_dataclasses_in(hint))
    else:
        kinds = {kind: name for name, kind in registry.items()}
    return OptionDescription(
        name=field.name,
        type_name=_type_name(hint),
        default=_default(field),
        help=field.metadata.get("help", ""),
        is_live_object=bool(field.metadata.get("runtime")),
        kinds=kinds,
    )


def _dataclasses_in(hint: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        yield hint
    for argument in typing.get_args(hint):
        yield from _dataclasses_in(argument)


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
        return str(value) if dataclasses.is_dataclass(value) else repr(value)
    if field.default_factory is not MISSING:
        value = field.default_factory()
        return f"{type(value).__name__}()" if dataclasses.is_dataclass(value) else repr(value)
    return "required"

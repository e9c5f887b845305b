"""Single values of a recipe, converted to the type that a config field declares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import make_dataclass
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compression_manager.errors import ConfigError, suggest

_UNCHANGED = (bool, int, float, str)


def convert_scalar(types: Sequence[Any], value: Any, place: str, expected: str) -> Any:
    """Return `value` as one of `types`: an int as a float, a text as a Path or an Enum.

    What Python would refuse is refused here: no text is a number, no number a text or a bool.

    Args:
        types: members of the declared union: int, float, bool, str, Path, an Enum, a Literal
            or None.
        value: plain value from YAML, not None.
        place: file and key path, for error messages.
        expected: what is valid, in words.

    Raises:
        ConfigError: the value is of none of these types, or a type is none that YAML can hold.
    """
    literals = [choice for item in types for choice in _literals(item)]
    for choice in literals:
        if type(choice) is type(value) and choice == value:
            return value
    others = [item for item in types if get_origin(item) is not Literal and item is not NoneType]
    if type(value) in others and type(value) in _UNCHANGED:
        return value
    # OmegaConf would read '8' as a number, 'yes' or 1 as a bool, and `metric: true` as 'True'.
    kinds = set(others)
    text_for_number = kinds <= {bool, int, float} and isinstance(value, str)
    number_for_bool = kinds == {bool} and not isinstance(value, bool)
    value_for_text = {str} <= kinds <= {str, Path} and not isinstance(value, str)
    if not others or value is None or text_for_number or number_for_bool or value_for_text:
        raise _mismatch(types, value, place, expected)
    schema = _schema(others, place)
    try:
        merged = OmegaConf.merge(schema, {"value": value})
        # The schema makes it a mapping, which the declared return type does not say.
        return OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)["value"]  # type: ignore[index, call-overload]
    except OmegaConfBaseException as error:
        raise _mismatch(types, value, place, expected) from error


def show_type(declared: Any) -> str:
    """Return a type as users know it: `int`, `'a' or 'b'`, `null`."""
    if declared is NoneType:
        return "null"
    choices = _literals(declared) or _members(declared)
    if choices:
        return " or ".join(repr(choice) for choice in choices)
    return getattr(declared, "__name__", str(declared))


def show_value(value: Any) -> str:
    """Return a value as it stands in YAML, shortened."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _schema(types: Sequence[Any], place: str) -> Any:
    union = types[0]
    for item in types[1:]:
        union = union | item
    try:
        return OmegaConf.structured(make_dataclass("Schema", [("value", union)]))
    except OmegaConfBaseException as error:
        raise ConfigError(
            f"{place}: an option of type {show_type(union)} cannot be given in a recipe; its "
            "field needs a registry, or option(..., runtime=True)."
        ) from error


def _mismatch(types: Sequence[Any], value: Any, place: str, expected: str) -> ConfigError:
    choices = [str(choice) for item in types for choice in (*_literals(item), *_members(item))]
    if isinstance(value, str) and not choices and reads_as_number(value):
        return ConfigError(
            f"{place}: expected {expected}, got the text {show_value(value)}; write it without "
            "quotes (a number from the environment: ${oc.decode:${oc.env:NAME}})."
        )
    hint = f"; {suggest(value, choices)}" if choices and isinstance(value, str) else "."
    return ConfigError(f"{place}: expected {expected}, got {show_value(value)}{hint}")


def reads_as_number(text: str) -> bool:
    """Return whether a text would be a number without quotes."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def _literals(declared: Any) -> tuple[Any, ...]:
    return get_args(declared) if get_origin(declared) is Literal else ()


def _members(declared: Any) -> tuple[str, ...]:
    is_enum = isinstance(declared, type) and issubclass(declared, Enum)
    return tuple(declared.__members__) if is_enum else ()

"""Config dataclasses as plain values, as a recipe has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from compression_manager.configuration.fields import init_fields


def describe_config(config: Any, *, live_objects: bool = True) -> dict[str, Any]:
    """Return a config dataclass as JSON-able values; `build_config` reads them back.

    Live objects are shown by the name of their class, functions by their own; or left out, as in
    a recipe.
    """
    return {
        field.name: _describe(
            getattr(config, field.name), field.metadata.get("registry"), live_objects
        )
        for field in init_fields(type(config))
        if live_objects or not field.metadata.get("runtime")
    }


def _describe(value: Any, registry: Mapping[str, type] | None, live_objects: bool) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = {config_class: name for name, config_class in (registry or {}).items()}
        kind = names.get(type(value), type(value).__name__)
        options = describe_config(value, live_objects=live_objects)
        return {"type": kind, **options} if registry is not None else options
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, registry, live_objects) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_describe(item, registry, live_objects) for item in value]
    return getattr(value, "__qualname__", type(value).__name__)

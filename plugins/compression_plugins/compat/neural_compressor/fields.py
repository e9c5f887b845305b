"""What becomes of each field of a Neural Compressor config; the documentation reads it as well."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class FieldMeaning:
    """What a field of Neural Compressor 2.6 is here.

    Attributes:
        name: of the field.
        default: 2.6's, as it is written.
        is_used: false if the field has no meaning here.
        text: what it becomes; or why it has no meaning.
    """

    name: str
    default: str
    is_used: bool
    text: str


def becomes(text: str) -> dict[str, Any]:
    """Return the `metadata` of a field that has a meaning here; `text` says which."""
    return {"text": text, "is_used": True}


def without_meaning(reason: str) -> dict[str, Any]:
    """Return the `metadata` of a field that is accepted and ignored; `reason` says why."""
    return {"text": reason, "is_used": False}


def describe_fields(config_class: type) -> list[FieldMeaning]:
    """Return what the fields of a config class mean, in their order."""
    return [
        FieldMeaning(
            item.name, repr(_default(item)), item.metadata["is_used"], item.metadata["text"]
        )
        for item in fields(config_class)
    ]


def ignored_fields(config: Any) -> list[str]:
    """Return a message for every field without meaning whose value is not the default one."""
    return [
        f"{type(config).__name__}.{item.name} has no meaning here and is ignored: "
        f"{item.metadata['text']}"
        for item in fields(config)
        if not item.metadata["is_used"] and getattr(config, item.name) != _default(item)
    ]


def _default(item: Any) -> Any:
    return item.default if item.default_factory is MISSING else item.default_factory()

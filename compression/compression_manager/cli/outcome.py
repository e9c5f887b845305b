"""What a subcommand found, and how documents are written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import yaml

from compression_manager.configuration.values import reads_as_number

_WIDTH = 100


@dataclass(frozen=True)
class Outcome:
    """What a subcommand found.

    Attributes:
        output: for stdout, ending with a line break unless it is empty.
        problems: for stderr; the exit code is 1 if there is one.
    """

    output: str
    problems: tuple[str, ...] = ()


def to_json(document: Any) -> str:
    """Return JSON, indented, with a line break at its end."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


class _Dumper(yaml.SafeDumper):
    """Quotes what recipes would read as a number: they take 1e3 for one, YAML 1.1 does not."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "'" if reads_as_number(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def to_yaml(document: Any) -> str:
    """Return YAML in the document's own order."""
    text: str = yaml.dump(
        document, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_WIDTH
    )
    return text

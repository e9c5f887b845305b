"""Refuses YAML whose size explodes when it is read, before it is read.

The C parser behind OmegaConf recurses and takes the process down on deep nesting, and nested
aliases multiply a short text into gigabytes. Both show in the stream of parser events, which
needs neither recursion nor memory.
"""

from __future__ import annotations

import yaml

MAX_DEPTH = 50
MAX_NODES = 100_000

# OmegaConf's own choice; the parsers differ in what they accept.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_limits(text: str) -> None:
    """Raise unless `text` is YAML of at most `MAX_DEPTH` levels and `MAX_NODES` nodes.

    Raises:
        ValueError: too deep, or too large once its aliases are expanded.
        yaml.YAMLError: no YAML.
    """
    sizes = [0]
    anchors: list[str | None] = []
    anchored: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, (yaml.MappingStartEvent, yaml.SequenceStartEvent)):
            sizes.append(1)
            anchors.append(event.anchor)
        elif isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
            size, anchor = sizes.pop(), anchors.pop()
            sizes[-1] += size
            if anchor is not None:
                anchored[anchor] = size
        elif isinstance(event, yaml.AliasEvent):
            sizes[-1] += anchored.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            sizes[-1] += 1
        if len(sizes) > MAX_DEPTH:
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        if sizes[-1] > MAX_NODES:
            raise ValueError(f"it has more than {MAX_NODES} entries once aliases are expanded")

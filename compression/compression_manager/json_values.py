"""Values as JSON can hold them: it has no infinity, and nothing that is not a number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def json_values(value: Any) -> Any:
    """Return mappings, lists and tuples as dicts and lists, and numbers that JSON lacks as texts.

    All else is returned as it is.
    """
    if isinstance(value, Mapping):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""What the studies share: confidence intervals, and a check that settings are not mixed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# 97.5% quantiles of Student's t, by degrees of freedom.
T_QUANTILES = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half the width of its 95% confidence interval (Student's t)."""
    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.inf
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, T_QUANTILES.get(count - 1, 2.571) * deviation / math.sqrt(count)


def described(values: Sequence[float]) -> dict[str, float]:
    """Return mean and half width as the summaries hold them."""
    mean, half_width = interval(values)
    return {"mean": mean, "half_width": half_width}


def points(entry: dict[str, float], sign: str = "") -> str:
    """Return a mean and its interval in percentage points."""
    return f"{100 * entry['mean']:{sign}.2f} ± {100 * entry['half_width']:.2f}"


def check_same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Refuse to mix results of several settings in one folder."""
    if path.exists() and json.loads(path.read_text()) != settings:
        raise SystemExit(
            f"error: {path.parent} holds results with other settings: {path.read_text()}; "
            "choose another --output, or delete it."
        )
    path.write_text(json.dumps(settings))

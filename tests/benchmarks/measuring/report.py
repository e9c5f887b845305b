"""Tables on screen, JSON on disk, and bar charts of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("runs/benchmarks")
"""Where the benchmarks write unless told otherwise."""

BLUE, GREY, RED = "#3b6ea5", "#b8c4d0", "#b03a2e"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


def row(cells: Sequence[object], widths: Sequence[int]) -> str:
    """Return one line of a table; the first cell is on the left, the others on the right."""
    first, *rest = (str(cell) for cell in cells)
    shown = [f"{first:<{widths[0]}}"]
    shown += [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
    return "  ".join(shown)


def bar_chart(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[float, float, float]]],
    *,
    title: str,
    axis: str,
    reference: float | None = 1.0,
    bars: Mapping[tuple[str, str], float] | None = None,
) -> None:
    """Draw horizontal bars, a panel beside the other.

    Args:
        path: of the image.
        panels: title of the panel -> name of the bar -> median, lower and upper quartile.
        title: of the whole.
        axis: label of the values.
        reference: where a vertical line is drawn.
        bars: (panel, name) -> the aim, drawn as a tick across the bar.
    """
    from matplotlib.figure import Figure  # an extra, which the figures do without

    most = max(len(bars) for bars in panels.values())
    figure = Figure(figsize=(5.4 * len(panels), 1.3 + 0.42 * most), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (name, values) in zip(axes, panels.items(), strict=True):
        names = list(values)[::-1]
        medians = [values[key][0] for key in names]
        errors = [
            [values[key][0] - values[key][1] for key in names],
            [values[key][2] - values[key][0] for key in names],
        ]
        panel.barh(names, medians, xerr=errors, color=BLUE, ecolor="#222222", height=0.62)
        for index, (key, median) in enumerate(zip(names, medians, strict=True)):
            shown = f"{median:.2f}" if median < 100 else f"{median:,.0f}"
            aim = (bars or {}).get((name, key))
            panel.annotate(
                shown,
                (max(values[key][2], aim or 0.0), index),
                xytext=(5, 0),
                textcoords="offset points",
                va="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
            )
            if aim is not None:
                panel.plot([aim, aim], [index - 0.4, index + 0.4], color=RED, linewidth=2)
        if reference is not None:
            panel.axvline(reference, color="#555555", linewidth=1, linestyle="--", zorder=0)
        panel.set_xlim(0, 1.15 * max([*(high for _, _, high in values.values()), reference or 0]))
        panel.set_title(name, fontsize=10)
        panel.set_xlabel(axis, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}", flush=True)

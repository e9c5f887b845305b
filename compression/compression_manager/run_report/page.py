"""The report of a run: one HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

import yaml

from compression_manager.run_report.chart import NARROW, WIDE, line_chart, range_chart
from compression_manager.run_report.curve import Curve
from compression_manager.run_report.layers_table import layers_section
from compression_manager.run_report.run import EVALUATION, LOSS, Run
from compression_manager.run_report.style import STYLE
from compression_manager.run_report.text import (
    document,
    duration,
    number,
    remark,
    section,
    size,
    table,
)

# Ranges share this many drawn points, so that the page of a large model stays below a megabyte.
_RANGE_POINTS = 12_000
_MOST_RANGES = 300
_MOST_OTHERS = 60


def render(run: Run) -> str:
    """Return the page: summary, charts, layers, notes, recipe and environment, in ASCII.

    It refers to nothing outside of itself. All that comes from the run is escaped.
    """
    name = run.folder.resolve().name or str(run.folder)
    body = [
        f"<header><h1>{escape(name)}</h1>{remark(_sources(run))}</header>",
        _cards(run),
        section("Loss terms", _losses(run)),
        section("Evaluations", _evaluations(run)),
        section("Ranges of the quantizers", _ranges(run)),
        section("Layers", layers_section(run)),
        section("Notes", _notes(run)),
        section("Other curves", _others(run)),
        section("Recipe", _recipe(run)),
        section("Environment", _environment(run)),
    ]
    return document(f"{name} - compression report", body, STYLE)


def _sources(run: Run) -> str:
    parts = []
    if run.checkpoint is not None:
        parts.append(f"checkpoint {run.checkpoint}")
    if run.events is not None:
        parts.append(f"TensorBoard's event files in {run.events}")
    return f"Read from {' and '.join(parts)}."


def _cards(run: Run) -> str:
    cards = "".join(
        f'<div class="card"><span>{escape(title)}</span><b>{escape(value)}</b>'
        f"<span>{escape(more)}</span></div>"
        for title, value, more in _summary(run)
    )
    return f'<div class="cards">{cards}</div>'


def _summary(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield title, value and explanation of each number that comes first."""
    if run.bytes is not None:
        before, after = run.bytes
        smaller = f"{before / after:.3g} times smaller" if 0 < after < before else "not smaller"
        # A narrow card breaks the line behind the arrow, not between a number and its unit.
        shown = [size(count).replace(" ", "\N{NO-BREAK SPACE}") for count in run.bytes]
        yield "Size of the tensors", " \N{RIGHTWARDS ARROW} ".join(shown), smaller
        quantized = [layer for layer in run.layers if layer["quantized"]]
        bits = {item["bits"] for layer in quantized for item in layer["quantizers"]}
        width = f"{', '.join(map(str, sorted(bits)))} bits" if bits else "all stay in float"
        yield "Quantized layers", f"{len(quantized)} of {len(run.layers)}", width
    yield from _metric_cards(run)
    yield "Optimizer steps", f"{run.global_step:,}", _how_long(run)
    plugins = _plugins(run)
    if plugins:
        yield "Plugins", str(len(plugins)), ", ".join(plugins)


def _metric_cards(run: Run) -> Iterator[tuple[str, str, str]]:
    best, watched = run.best, run.watched
    if best is not None and watched is not None:
        direction = "lower" if watched.lower_is_better else "higher"
        last = number(run.metrics[watched.name].last)
        yield (
            f"Best {watched.name}",
            number(best["metrics"][watched.name]),
            f"at step {best['global_step']:,}, {direction} is better; last {last}",
        )
        return
    for name, curve in list(run.metrics.items())[:2]:
        yield f"Last {name}", number(curve.last), f"of {len(curve.steps)} evaluations"


def _how_long(run: Run) -> str:
    parts = []
    if run.seconds is not None:
        parts.append(f"in {duration(run.seconds)}")
    if run.checkpoint_step is not None and run.checkpoint_step < run.global_step:
        parts.append(f"newest checkpoint at {run.checkpoint_step:,}")
    if run.stop_reason is not None:
        parts.append(f"stopped: {run.stop_reason}")
    return "; ".join(parts)


def _plugins(run: Run) -> list[str]:
    plugins = run.recipe.get("plugins")
    if isinstance(plugins, Mapping):
        return [str(name) for name in plugins]
    keys = [key.split(".") for key in run.recipe if key.startswith("plugins.")]
    return list(dict.fromkeys(parts[1] for parts in keys))


def _losses(run: Run) -> str:
    if not run.losses:
        return remark(
            "Not recorded: checkpoints hold no losses. List TensorBoardConfig(directory=...) with "
            "a folder inside of the run's own."
        )
    explained = "Each term is shown before its weight; total, the weighted sum, was minimized."
    return remark(explained) + line_chart("Loss", run.losses, width=WIDE)


def _evaluations(run: Run) -> str:
    if not run.metrics:
        return ""
    best, watched = run.best, run.watched
    charts = "".join(
        line_chart(
            name,
            {name: curve},
            width=_width(len(run.metrics)),
            marked=best["global_step"] if best and watched and name == watched.name else None,
        )
        for name, curve in run.metrics.items()
    )
    names = list(run.metrics)
    rows = []
    for item in run.evaluations:
        mark = " (best)" if item is best else ""
        epoch = [str(item["epoch"])] if "epoch" in item else []
        values = [_value(item["metrics"].get(name)) for name in names]
        rows.append([f"{item['global_step']:,}{mark}", *epoch, *values])
    header = ["step", *(["epoch"] if "epoch" in run.evaluations[0] else []), *names]
    listed = table(header, rows, numeric=range(len(header)))
    summary = f"<summary>All {len(rows)} evaluations</summary>"
    return f"{_arranged(charts, len(names))}<details>{summary}{listed}</details>"


def _value(value: Any) -> str:
    return "" if value is None else number(value)


def _ranges(run: Run) -> str:
    if not run.ranges:
        return ""
    shown = list(run.ranges.items())[:_MOST_RANGES]
    points = max(8, min(80, _RANGE_POINTS // len(shown)))
    tiles = "".join(
        range_chart(tag.removeprefix("quantization/"), item.low, item.high, points)
        for tag, item in shown
    )
    text = "What the integers can represent, over the optimizer steps; the dashed line is zero."
    if run.events is None:
        text += " From the checkpoints that are left; TensorBoard's event files hold more points."
    if len(shown) < len(run.ranges):
        text += f" The first {len(shown)} of {len(run.ranges)}."
    return f'{remark(text)}<div class="tiles">{tiles}</div>'


def _notes(run: Run) -> str:
    rows = [[plugin, note] for plugin, note in run.notes.items()]
    return table(["plugin", "note"], rows) if rows else ""


def _others(run: Run) -> str:
    """Draw every curve that has no place of its own; nothing that was published is hidden."""
    others = {
        tag: curve
        for tag, curve in run.curves.items()
        if not tag.startswith((LOSS, EVALUATION)) and not _belongs_to_a_range(tag, run)
    }
    shown: dict[str, Curve] = dict(list(others.items())[:_MOST_OTHERS])
    width = _width(len(shown))
    charts = "".join(line_chart(tag, {tag: curve}, width=width) for tag, curve in shown.items())
    if not charts:
        return ""
    left_out = len(others) - len(shown)
    more = remark(f"{left_out} more are left out.") if left_out else ""
    return _arranged(charts, len(shown)) + more


def _width(charts: int) -> float:
    return WIDE if charts == 1 else NARROW


def _arranged(charts: str, count: int) -> str:
    """Return several charts side by side; one alone takes the whole width."""
    return charts if count == 1 else f'<div class="pairs">{charts}</div>'


def _belongs_to_a_range(tag: str, run: Run) -> bool:
    """Return whether it is the scale or zero point behind a range that is drawn."""
    return tag.rpartition("/")[0] in run.ranges


def _recipe(run: Run) -> str:
    if not run.recipe:
        return remark(
            "Not recorded: without a checkpoint it is known once TensorBoard's plugin has seen "
            "the end of training."
        )
    recipe = run.recipe
    if "plugins" not in recipe:
        recipe = {key: _whole(value) for key, value in recipe.items()}
    text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
    return f"<pre>{escape(text)}</pre>"


def _whole(value: Any) -> Any:
    """Return 8.0 as 8: event files know no integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _environment(run: Run) -> str:
    if not run.environment:
        return remark(
            "Not recorded: it is part of the checkpoints that the checkpoint plugin writes."
        )
    rows = []
    for key, value in run.environment.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        rows.append([key.replace("_", " "), "unknown" if value is None else shown])
    return table(["what", "value"], rows)

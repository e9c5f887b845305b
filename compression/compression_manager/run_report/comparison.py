"""Several runs side by side: as a table of texts, as JSON values, and as a page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compression_manager.configuration.recipe import flat_recipe
from compression_manager.json_values import json_values
from compression_manager.run_report.chart import WIDE, line_chart
from compression_manager.run_report.curve import Curve
from compression_manager.run_report.run import Run
from compression_manager.run_report.style import STYLE
from compression_manager.run_report.text import document, number, remark, section, table

_ABSENT = "-"


@dataclass(frozen=True)
class Row:
    """One quantity of all runs.

    Attributes:
        name: what it is.
        values: one for each run; None where it is not known.
    """

    name: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Comparison:
    """What several runs achieved, and in which options they differ.

    Attributes:
        labels: the folders, as the user named them.
        results: steps, bytes, metrics and loss terms.
        options: those options of the recipes whose values differ; None where a run has no such
            option.
    """

    labels: tuple[str, ...]
    results: tuple[Row, ...]
    options: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: one dict per run, in the order of `labels`."""
        return {
            "runs": [
                {
                    "run": label,
                    "results": {row.name: json_values(row.values[index]) for row in self.results},
                    "options": {row.name: json_values(row.values[index]) for row in self.options},
                }
                for index, label in enumerate(self.labels)
            ]
        }

    def __str__(self) -> str:
        lines = [["", *self.labels], *_texts(self.results)]
        if self.options:
            lines += [["options that differ:", *("" for _ in self.labels)]]
            lines += _texts(self.options)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


def compare(runs: Sequence[Run]) -> Comparison:
    """Compare what is comparable without the models.

    Losses are means over the last tenth of the recorded steps. The best metric is that which a
    plugin of the recipe watches, in each run its own.
    """
    before, after = zip(*(run.bytes or (None, None) for run in runs), strict=True)
    results = [
        Row("optimizer steps", tuple(run.global_step for run in runs)),
        Row("evaluations", tuple(len(run.evaluations) for run in runs)),
        Row("bytes before", before),
        Row("bytes after", after),
        Row("quantized layers", tuple(_quantized(run) for run in runs)),
    ]
    results += _best_rows(runs)
    metrics = [run.metrics for run in runs]
    results += [
        Row(f"last {name}", tuple(_of(own, name, lambda curve: curve.last) for own in metrics))
        for name in _names(metrics)
    ]
    losses = [run.losses for run in runs]
    results += [
        Row(f"loss/{name}", tuple(_of(own, name, Curve.recent_mean) for own in losses))
        for name in _names(losses)
    ]
    labels = tuple(str(run.folder) for run in runs)
    return Comparison(labels, tuple(results), tuple(_differing_options(runs)))


def render_comparison(runs: Sequence[Run]) -> str:
    """Return an HTML page: the table, and charts with a line per run."""
    comparison = compare(runs)
    header = ["", *comparison.labels]
    numeric = range(1, len(header))
    body = [
        f"<header><h1>Comparison of {len(runs)} runs</h1></header>",
        section("Results", table(header, _texts(comparison.results), numeric=numeric)),
        _charts("Loss terms", [run.losses for run in runs], comparison.labels),
        _charts("Evaluations", [run.metrics for run in runs], comparison.labels),
        section(
            "Options that differ",
            table(header, _texts(comparison.options))
            if comparison.options
            else remark("None: the recipes are equal."),
        ),
    ]
    return document("Comparison of runs", body, STYLE)


def _charts(title: str, curves: Sequence[Mapping[str, Curve]], labels: Sequence[str]) -> str:
    """Return a section with one chart per name, in which each run has its own color."""
    drawn = []
    for name in _names(curves):
        of_runs = [own.get(name, Curve((), ())) for own in curves]
        drawn.append(line_chart(name, dict(zip(labels, of_runs, strict=True)), width=WIDE))
    return section(title, "".join(drawn))


def _best_rows(runs: Sequence[Run]) -> list[Row]:
    names = dict.fromkeys(run.watched.name for run in runs if run.watched is not None)
    rows = []
    for name in names:
        best = [
            run.best if run.watched is not None and run.watched.name == name else None
            for run in runs
        ]
        rows += [
            Row(f"best {name}", tuple(item and float(item["metrics"][name]) for item in best)),
            Row(f"best {name} at step", tuple(item and item["global_step"] for item in best)),
        ]
    return rows


def _quantized(run: Run) -> int | None:
    return sum(layer["quantized"] for layer in run.layers) if run.layers else None


def _differing_options(runs: Sequence[Run]) -> list[Row]:
    recipes = [flat_recipe(run.recipe) for run in runs]
    # Of a run without a recipe nothing is known, which is no difference.
    known = [recipe for recipe in recipes if recipe]
    return [
        Row(key, tuple(recipe.get(key) for recipe in recipes))
        for key in dict.fromkeys(key for recipe in known for key in recipe)
        if any(recipe.get(key) != known[0].get(key) for recipe in known)
    ]


def _names(curves: Sequence[Mapping[str, Curve]]) -> list[str]:
    return list(dict.fromkeys(name for own in curves for name in own))


def _of(own: Mapping[str, Curve], name: str, value: Callable[[Curve], float]) -> float | None:
    return float(value(own[name])) if name in own else None


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    return [[row.name, *map(_text, row.values)] for row in rows]


def _text(value: Any) -> str:
    if value is None:
        return _ABSENT
    # Event files know no bools and no integers; one is shown as a number.
    return str(value) if isinstance(value, str) else number(value)

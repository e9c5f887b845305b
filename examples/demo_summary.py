"""The demo's table, chart, JSON file and latency measurement."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from safetensors.torch import load_file
from torch import Tensor, nn

import models
from compression_manager import deploy

MODELS = ("teacher", "student", "distilled", "qat", "distilled_qat", "int8")
BATCHES = (1, 64)
NOTE = (
    "In brackets: ratio to the teacher. `qat` and `distilled_qat` are training-time models, saved "
    "and timed in floating point; `int8` is `distilled_qat` converted."
)
Entry = dict[str, Any]


def check_same_settings(output: Path, recipe: Path, data: Path | None, trainings: object) -> None:
    """Raise SystemExit if `output` holds results of another recipe, network or data set."""
    digest = hashlib.sha256()
    for source in (recipe, Path(models.__file__)):
        digest.update(source.read_bytes())
    digest.update(f"{trainings}{data.resolve() if data else 'embedded'}".encode())
    marker = output / "settings.sha256"
    if marker.exists() and marker.read_text() != digest.hexdigest():
        raise SystemExit(
            f"{output} holds results of other settings (recipe, training, networks or data); "
            "run with --fresh, delete it, or choose another --output."
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text(digest.hexdigest())


def add_latency(results: dict[str, Entry], images: Tensor, rounds: int = 30) -> None:
    """Add `latency_ms` (batch size -> median milliseconds) to every entry.

    All models take turns in each round, so that a slow moment of the machine hits them all.
    """
    networks = {name: _load(name, entry) for name, entry in results.items()}
    for batch in BATCHES:
        inputs = images[:batch]
        times: dict[str, list[float]] = {name: [] for name in networks}
        with torch.inference_mode():
            for _ in range(rounds):
                for name, network in networks.items():
                    start = time.perf_counter()
                    network(inputs)
                    times[name].append((time.perf_counter() - start) * 1e3)
        for name, measured in times.items():
            latency = results[name].setdefault("latency_ms", {})
            latency[str(batch)] = statistics.median(measured)


def _load(name: str, entry: Entry) -> nn.Module:
    """Return the saved model for timing; fake-quantized ones are timed as float models."""
    if name == "int8":
        return deploy.load(entry["path"], models.student())
    network = models.teacher() if name == "teacher" else models.student()
    state = load_file(entry["path"])
    own = network.state_dict()
    network.load_state_dict({key: state[key] for key in own})
    return network.eval()


def write(runs: list[dict[str, Entry]], output: Path) -> None:
    """Print the table and write `summary.json` and `summary.png`."""
    summary: dict[str, Any] = {name: _mean_entry([run[name] for run in runs]) for name in MODELS}
    summary["bars"] = _bars(runs)
    summary["seeds"] = runs
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    table = format_table(summary, runs)
    (output / "summary.md").write_text(table + "\n")
    print(f"\n{table}\n")
    for text in describe_bars(summary["bars"]):
        print(text)
    draw(summary, runs, output / "summary.png")
    print(
        f"\nwritten: {output / 'summary.json'}, {output / 'summary.md'}, {output / 'summary.png'}"
    )


def _mean_entry(entries: list[Entry]) -> Entry:
    return {
        "accuracy": statistics.mean(entry["accuracy"] for entry in entries),
        "accuracy_spread": _spread([entry["accuracy"] for entry in entries]),
        "parameters": entries[0]["parameters"],
        "bytes": round(statistics.mean(entry["bytes"] for entry in entries)),
        "latency_ms": {
            str(batch): statistics.mean(entry["latency_ms"][str(batch)] for entry in entries)
            for batch in BATCHES
        },
        "path": entries[0]["path"],
    }


def _spread(values: list[float]) -> float | None:
    """Return the sample standard deviation, or None for a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _bars(runs: list[dict[str, Entry]]) -> dict[str, float]:
    """Return the figures that the project promises to hold as means of three seeds."""

    def mean(figure: Any) -> float:
        return statistics.mean(figure(run) for run in runs)

    return {
        "int8_to_teacher_accuracy": mean(lambda r: r["int8"]["accuracy"])
        / mean(lambda r: r["teacher"]["accuracy"]),
        "teacher_to_int8_bytes": mean(lambda r: r["teacher"]["bytes"] / r["int8"]["bytes"]),
        "distilled_minus_student_accuracy": mean(
            lambda r: r["distilled"]["accuracy"] - r["student"]["accuracy"]
        ),
        "int8_disagreement_with_fake_quantized": max(
            run["int8"]["disagreement_with_fake_quantized"] for run in runs
        ),
    }


def describe_bars(bars: dict[str, float]) -> list[str]:
    """Return one line per bar: the figure, the goal, and whether it is met."""
    checks = (
        ("int8 accuracy / teacher accuracy", "int8_to_teacher_accuracy", ">=", 0.98),
        ("teacher bytes / int8 bytes", "teacher_to_int8_bytes", ">=", 20.0),
        ("distilled - alone, accuracy", "distilled_minus_student_accuracy", ">", 0.0),
        (
            "int8 predictions that differ from training",
            "int8_disagreement_with_fake_quantized",
            "<=",
            0.001,
        ),
    )
    lines = []
    for text, key, relation, goal in checks:
        value = bars[key]
        met = {">=": value >= goal, ">": value > goal, "<=": value <= goal}[relation]
        lines.append(f"{'met ' if met else 'MISS'}  {text}: {value:.4g} (goal {relation} {goal:g})")
    return lines


def format_table(summary: dict[str, Any], runs: list[dict[str, Entry]]) -> str:
    """Return the Markdown table; ratios to the teacher stand in brackets."""
    teacher = summary["teacher"]
    count = f"mean of {len(runs)} seeds" if len(runs) > 1 else "1 seed"
    rows = [
        f"| model ({count}) | accuracy | parameters | bytes | batch 1, ms | batch 64, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name in MODELS:
        entry = summary[name]
        spread = entry["accuracy_spread"]
        plus_minus = "" if spread is None else f" ± {spread:.2%}"
        cells = [
            f"{entry['accuracy']:.2%}{plus_minus} ({entry['accuracy'] / teacher['accuracy']:.3f})",
            f"{entry['parameters']:,} ({_ratio(entry['parameters'], teacher['parameters'])})",
            f"{entry['bytes']:,} ({_ratio(entry['bytes'], teacher['bytes'])})",
        ]
        for batch in BATCHES:
            latency, base = entry["latency_ms"][str(batch)], teacher["latency_ms"][str(batch)]
            cells.append(f"{latency:.2f} ({_ratio(latency, base)})")
        rows.append(f"| {name} | {' | '.join(cells)} |")
    rows += ["", NOTE]
    return "\n".join(rows)


def _ratio(value: float, base: float) -> str:
    return (
        "1" if value == base else f"1/{base / value:.1f}" if value < base else f"{value / base:.1f}"
    )


def draw(summary: dict[str, Any], runs: list[dict[str, Entry]], path: Path) -> None:
    """Draw accuracy against size; every model is a point with the spread of its seeds."""
    # A Figure of its own needs no display and no global state, unlike pyplot.
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    colors = mpl.colormaps["tab10"]
    for index, name in enumerate(MODELS):
        entry = summary[name]
        size = entry["bytes"] / 1024
        values = [run[name]["accuracy"] * 100 for run in runs]
        axes.scatter([size] * len(values), values, color=colors(index), alpha=0.35, s=18)
        axes.scatter([size], [entry["accuracy"] * 100], color=colors(index), s=80, label=name)
    goal = 98 * summary["teacher"]["accuracy"]
    axes.axhline(goal, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "98% of the teacher",
        (0.99, goal),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="grey",
    )
    axes.axvline(summary["teacher"]["bytes"] / 1024 / 20, color="grey", linestyle=":", linewidth=1)
    axes.annotate(
        "1/20 of its bytes",
        (summary["teacher"]["bytes"] / 1024 / 20, 0.02),
        xycoords=("data", "axes fraction"),
        rotation=90,
        ha="right",
        color="grey",
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("saved model, KiB")
    axes.set_ylabel("test accuracy, %")
    count = f"mean of {len(runs)} seeds, single runs pale" if len(runs) > 1 else "one seed"
    axes.set_title(f"Fashion-MNIST: accuracy against size ({count})")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=120)

"""The distillation study's figures, table and chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill_and_quantize import TEACHER_TRAINING
from distillation_strategies import BY_NAME, CHECKS, CONTROL, STRATEGIES
from study_statistics import described, points

GAIN, NO_GAIN, LOSS = "gain", "no gain", "worse"
COLORS = {GAIN: "#2a7f62", NO_GAIN: "#a9b4c2", LOSS: "#c0504d"}


def summarize(
    tested: Mapping[str, Sequence[dict[str, Any]]],
    teachers: Sequence[float],
    every_run: Sequence[dict[str, Any]],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Return everything that there is to tell.

    Args:
        tested: strategy -> the tested run of each seed.
        teachers: each seed's teacher's accuracy on the test images.
        every_run: all that were trained, those for choosing a setting too.
        settings: what all have in common.
    """
    accuracies = {name: [run["test"] for run in found] for name, found in tested.items()}
    control = accuracies[CONTROL]
    strategies = {}
    for name, own in accuracies.items():
        gain = described([one - other for one, other in zip(own, control, strict=True)])
        strategies[name] = {
            "title": BY_NAME[name].title,
            "setting": tested[name][0]["setting"],
            "best_epochs": [run["best_epoch"] for run in tested[name]],
            "accuracy": described(own),
            "gain": gain,
            "verdict": "" if name == CONTROL else verdict(gain),
            "seeds": own,
        }
        if name in CHECKS:
            same = accuracies[BY_NAME[name].like]
            strategies[name]["difference_to_same"] = described(
                [one - other for one, other in zip(own, same, strict=True)]
            )
    return {
        "settings": dict(settings),
        "teacher": {**described(teachers), "seeds": list(teachers)},
        "strategies": strategies,
        "runs": list(every_run),
    }


def verdict(gain: Mapping[str, float]) -> str:
    """Return what the interval of the difference to the control says."""
    if gain["mean"] > gain["half_width"]:
        return GAIN
    return LOSS if -gain["mean"] > gain["half_width"] else NO_GAIN


def ranked(summary: Mapping[str, Any]) -> list[str]:
    """Return the strategies by falling gain, without the control."""
    found = summary["strategies"]
    return sorted(set(found) - {CONTROL}, key=lambda name: (-found[name]["gain"]["mean"], name))


def to_markdown(summary: Mapping[str, Any]) -> str:
    """Return the table, the best first."""
    found = summary["strategies"]
    count = len(summary["teacher"]["seeds"])
    lines = [
        f"| strategy ({count} seeds) | chosen setting | test accuracy, % | gain, points | |",
        "|---|---|---|---|---|",
        f"| teacher | | {points(summary['teacher'])} | | |",
    ]
    for name in [*ranked(summary), CONTROL]:
        entry = found[name]
        gain = "" if name == CONTROL else points(entry["gain"], "+")
        lines.append(
            f"| {entry['title']} | {setting_text(entry['setting'])} | {points(entry['accuracy'])} "
            f"| {gain} | {entry['verdict']} |"
        )
    moved = summary["settings"]["student_shift"]
    lines += [
        "",
        f"The teachers saw images mirrored and moved by up to {TEACHER_TRAINING.shift} pixel, the "
        f"students mirrored and moved by up to {moved}.",
        *checks(summary),
    ]
    unfinished = [item.title for item in STRATEGIES if item.name not in found]
    if unfinished:
        lines += ["", f"Not measured: {'; '.join(unfinished)}."]
    return "\n".join(lines).rstrip() + "\n"


def checks(summary: Mapping[str, Any]) -> list[str]:
    """Return a line for each strategy that has to equal another one."""
    return [
        f"Check: {entry['title'].removesuffix(' (check)')} - {BY_NAME[BY_NAME[name].like].title}, "
        f"same setting: {points(entry['difference_to_same'], '+')} points."
        for name, entry in summary["strategies"].items()
        if "difference_to_same" in entry
    ]


def setting_text(setting: Mapping[str, float]) -> str:
    """Return a setting in words."""
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in setting.items())


def draw(summary: Mapping[str, Any], path: Path) -> None:
    """Draw the gain of each strategy with its interval, the best on top."""
    found = summary["strategies"]
    names = list(reversed(ranked(summary)))
    figure = Figure(figsize=(9, 0.34 * len(names) + 1.9), layout="constrained")
    axes = figure.subplots()
    gains = [100 * found[name]["gain"]["mean"] for name in names]
    widths = [100 * found[name]["gain"]["half_width"] for name in names]
    colors = [COLORS[found[name]["verdict"]] for name in names]
    places = range(len(names))
    axes.barh(places, gains, color=colors, height=0.72)
    axes.errorbar(
        gains, places, xerr=widths, fmt="none", ecolor="#333333", elinewidth=1.1, capsize=3
    )
    control = found[CONTROL]["seeds"]
    for place, name in enumerate(names):
        singles = [100 * (a - b) for a, b in zip(found[name]["seeds"], control, strict=True)]
        axes.scatter(singles, [place] * len(singles), color="black", s=9, zorder=3)
    axes.axvline(0, color="black", linewidth=1)
    axes.set_yticks(places, [found[name]["title"] for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("test accuracy minus that of the undistilled student, points")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    for label, color in COLORS.items():
        axes.bar(0, 0, color=color, label=LEGEND[label])
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    count = len(control)
    teacher = 100 * (summary["teacher"]["mean"] - found[CONTROL]["accuracy"]["mean"])
    axes.set_title(
        f"What distillation adds ({count} seeds, dots; 95% intervals)\n"
        f"student alone {found[CONTROL]['accuracy']['mean']:.1%}, teacher {teacher:+.1f} points",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)


LEGEND = {
    GAIN: "better, interval above 0",
    NO_GAIN: "interval contains 0: no gain",
    LOSS: "worse, interval below 0",
}


def write(summary: Mapping[str, Any], folder: Path) -> str:
    """Write summary.json, summary.md and summary.png; return what to print."""
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    text = to_markdown(summary)
    (folder / "summary.md").write_text(text)
    draw(summary, folder / "summary.png")
    return f"\n{text}\nwritten: {folder}/summary.json, summary.md, summary.png"

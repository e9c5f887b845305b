"""The tables of docs/explanation/performance.md, made from the benchmarks' JSON files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "benchmarks"))

from compression_manager.deploy.parity import MODEL_TOLERANCE
from measuring.machine import in_words
from roofline import least_milliseconds

RECORDED = Path(__file__).parent / "images" / "performance"
NOT_YET = "Not measured yet."

Document = dict[str, Any]
Machines = dict[str, dict[str, Document]]
"""Machine -> name of the benchmark -> its JSON file."""


def blocks(machines: Machines) -> dict[str, str]:
    """Return name of the block -> what the recorded figures put there."""
    writers: dict[str, tuple[str, Callable[[Machines], list[str]]]] = {
        "machines": ("", machines_block),
        "training": ("training_step", training_block),
        "saved": ("training_step", saved_block),
        "rule": ("integer_rule", rule_block),
        "limits": ("training_step", limits_block),
        "profile": ("step_profile", profile_block),
        "inference": ("inference", inference_block),
        "inference-profile": ("inference_profile", inference_profile_block),
        "peers": ("peers", peers_block),
        "hooks": ("hooks", hooks_block),
    }
    written = {}
    for name, (benchmark, write) in writers.items():
        having = {key: own for key, own in machines.items() if not benchmark or benchmark in own}
        lines = write(having) if having else []
        written[name] = "\n" + "\n".join(lines or [NOT_YET]) + "\n"
    return written


def machines_block(machines: Machines) -> list[str]:
    """Return the machines, with bandwidth and peaks where they were measured."""
    lines = []
    for name, documents in machines.items():
        document = documents.get("training_step") or next(iter(documents.values()))
        lines.append(f"- **{name}**: {in_words(document['machine'])}.")
        if "roofline" in documents:
            found = documents["roofline"]["peaks"]
            lines[-1] += (
                f" Copies {found['copy']:.1f} GB/s, triad {found['triad']:.1f} GB/s; products of "
                f"float32 {found['float32']:.0f}, bfloat16 {found['bfloat16']:.0f}, int8 "
                f"{found['int8']:.0f} * 10^9 operations a second."
            )
    return lines


def training_block(machines: Machines) -> list[str]:
    """Return a table of the ratios: variants below one another, machines and models aside."""
    return _compared(machines, "training_step", "variant", _ratio) + _charts(
        machines, "training_step", "Ratios of the training step"
    )


def saved_block(machines: Machines) -> list[str]:
    """Return a table of what the forward pass keeps."""

    def cell(item: Document) -> str:
        return f"{item['saved_mib']:.0f} MiB, {item['saved_ratio']:.2f}"

    return _compared(machines, "training_step", "variant", cell)


def inference_block(machines: Machines) -> list[str]:
    """Return a table of the speed-ups: routes below one another."""

    def cell(item: Document) -> str:
        low, high = item["quartiles"]
        wrong = "" if item["error"] <= MODEL_TOLERANCE else ", wrong output"
        return f"{item['speed_up']:.1f} ({low:.1f} to {high:.1f}){wrong}"

    return _compared(machines, "inference", "route", cell) + _charts(
        machines, "inference", "Speed of inference"
    )


def peers_block(machines: Machines) -> list[str]:
    """Return a table per machine and kind of figure."""
    lines: list[str] = []
    for name, documents in machines.items():
        results = documents["peers"]["results"]
        models = list(dict.fromkeys(item["model"] for item in results))
        for what, title in (
            ("training", "time of a training step, ratio to float32"),
            ("inference", "int8 inference, times the speed of float32 eager"),
        ):
            chosen = [i for i in results if i["what"] == what and i["peer"] != "float32"]
            if not chosen:
                continue
            lines += [f"{name}, {title}:", "", *_head(["peer", *models])]
            for environment, peer in dict.fromkeys((i["environment"], i["peer"]) for i in chosen):
                own = [i for i in chosen if (i["environment"], i["peer"]) == (environment, peer)]
                version = own[0]["version"]
                shown = f"{peer} {version}" if version and version not in peer else peer
                cells = [_peer_cell(item) for item in own]
                lines.append(_line([f"{shown} (in `{environment}`)", *cells]))
            lines.append("")
    return lines[:-1]


def _peer_cell(item: Document) -> str:
    if "failed" in item:
        return f"failed: {item['failed']}"
    low, high = item["quartiles"]
    error = f", error {item['error']:.1%}" if "error" in item else ""
    return f"{item['value']:.2f} ({low:.2f} to {high:.2f}){error}"


def hooks_block(machines: Machines) -> list[str]:
    """Return what the framework itself costs, a list per machine."""
    lines: list[str] = []
    for name, documents in machines.items():
        found = documents["hooks"]
        hooks = ", ".join(
            f"{count} plugins {spread['median']:.1f} ({spread['low']:.1f} to "
            f"{spread['high']:.1f}; by CPU {spread['cpu']:.1f})"
            for count, spread in found["hooks"].items()
        )
        saved, steps = found["checkpoint"], found["steps"]
        overhead = ", ".join(
            f"{value:.0f} until step {int(count):,}"
            for count, value in steps["overhead_us"].items()
        )
        lines += [
            f"**{name}**",
            "",
            f"- All hooks of a step, in microseconds: {hooks}.",
            f"- Checkpoints: {saved['idle_us']:.1f} microseconds in a step that saves nothing; "
            f"{saved['save_ms']:.0f} ms for a save of {saved['megabytes']:.0f} MB, "
            f"{saved['ratio']:.2f} times `torch.save` with fsync.",
            "- A quantization-aware step of one small layer beside a plain one, in microseconds "
            f"more: {overhead}. Growth of the ratio from the first step to the last: "
            f"{steps['growth']:+.1%}.",
        ]
        for what, costs in found["layers"].items():
            shown = ", ".join(f"{n} layers {value:.0f}" for n, value in costs["ms"].items())
            lines.append(
                f"- {what.capitalize()}, in milliseconds: {shown}; exponent "
                f"{costs['exponent']:.2f}, between the last two {costs['last_exponent']:.2f}."
            )
        lines.append("")
    return lines[:-1]


def rule_block(machines: Machines) -> list[str]:
    """Return, per machine, how both paths of a layer compare and what the rule chooses."""
    lines: list[str] = []
    for name, documents in machines.items():
        found = documents["integer_rule"]
        lines += [f"{name}: {found['summary']}", ""]
        lines += _head(["layer", "rows", "summed", "columns", "integers to float32", "rule", ""])
        for item in found["results"]:
            low, high = item["quartiles"]
            ratio = f"{item['ratio']:.2f} ({low:.2f} to {high:.2f})"
            verdict = "right" if item["is_right"] else "wrong"
            lines.append(
                _line([item["kind"], *map(str, item["size"][:3]), ratio, item["chosen"], verdict])
            )
        lines.append("")
    return lines[:-1]


def limits_block(machines: Machines) -> list[str]:
    """Return, per machine and model, the least time of each part beside the measured time."""
    lines: list[str] = []
    for name, documents in machines.items():
        if "roofline" not in documents:
            continue
        bfloat16 = documents["roofline"]["peaks"]["bfloat16"]
        found = documents["roofline"]["peaks"] | {"bfloat16x3": bfloat16 / 3}
        features = documents["training_step"]["machine"]["features"]
        for model, work in documents["roofline"]["work"].items():
            measured = [
                item
                for item in documents["training_step"]["results"]
                if item["model"] == model and item["skipped"] is None
            ]
            if not measured:
                continue
            headings = ["step", "forward products", "backward products", "other operators"]
            lines += [f"{name}, {model}, in milliseconds:", ""]
            lines += _head([*headings, "sum", "measured", "limited by"])
            for item in measured:
                forward, backward = _types(item["variant"], features)
                least = least_milliseconds(work, found, forward, backward)
                rest = {**least, "quantizing and the rest": item["milliseconds"] - _sum(least)}
                limit = max(rest, key=lambda part: rest[part])
                cells = [f"{value:.0f}" for value in least.values()]
                cells += [f"{_sum(least):.0f}", f"{item['milliseconds']:.0f}", limit]
                lines.append(_line([item["title"], *cells]))
            lines.append("")
    return lines[:-1]


def profile_block(machines: Machines) -> list[str]:
    """Return, per machine and model, the parts of a step under the profiler."""
    lines: list[str] = []
    for name, documents in machines.items():
        results = documents["step_profile"]["results"]
        for model in dict.fromkeys(item["model"] for item in results):
            own = [item for item in results if item["model"] == model]
            lines += [f"{name}, {model}, in milliseconds:", "", *_head(["step", *own[0]["parts"]])]
            for item in own:
                lines.append(_line([item["title"], *(f"{v:.1f}" for v in item["parts"].values())]))
            lines.append("")
    return lines[:-1]


def inference_profile_block(machines: Machines) -> list[str]:
    """Return, per machine and model, the parts of a batch, and what bounds the fastest route."""
    lines: list[str] = []
    for name, documents in machines.items():
        document = documents["inference_profile"]
        for model, finding in document["findings"].items():
            own = [item for item in document["results"] if item["model"] == model]
            measured = [item for item in own if item["skipped"] is None]
            lines += [f"{name}, {model}, in milliseconds:", ""]
            lines += _head(["route", *measured[0]["parts"]])
            for item in measured:
                lines.append(_line([item["title"], *(f"{v:.1f}" for v in item["parts"].values())]))
            skipped = [item for item in own if item["skipped"] is not None]
            lines += ["", *(f"- {item['title']}: {item['skipped']}." for item in skipped)]
            lines += [*([""] if skipped else []), finding, ""]
    return lines[:-1]


def _sum(parts: dict[str, float]) -> float:
    return sum(parts.values())


def _types(variant: str, features: dict[str, bool]) -> tuple[str, str]:
    """Return the types of the forward and of the backward products of a variant."""
    if variant in ("bfloat16", "bfloat16x3"):
        return "int8", variant
    has_own = variant.endswith("native") and features["AVX2"] and not features["AVX512"]
    is_fake = variant == "float32" or variant.endswith("fake")
    on_integers = not is_fake and (features["VNNI"] or has_own)
    return ("int8" if on_integers else "float32"), "float32"


def _ratio(item: Document) -> str:
    low, high = item["quartiles"]
    bar = "" if item["bar"] is None else f", bar {item['bar']:.2f}"
    return f"{item['ratio']:.3f} ({low:.3f} to {high:.3f}){bar}"


def _compared(
    machines: Machines, benchmark: str, key: str, cell: Callable[[Document], str]
) -> list[str]:
    """Return a table per machine: one row for each `key`, one column for each model."""
    lines: list[str] = []
    for machine, documents in machines.items():
        results = documents[benchmark]["results"]
        models = list(dict.fromkeys(item["model"] for item in results))
        found = {(item[key], item["model"]): item for item in results}
        lines += [f"{machine}:", "", *_head(["", *models])]
        for name, title in {item[key]: item["title"] for item in results}.items():
            items = [found.get((name, model)) for model in models]
            shown = ["-" if _is_missing(item) else cell(item) for item in items]
            lines.append(_line([title, *shown]))
        skipped = {f"- {i['title']}: {i['skipped']}." for i in results if i["skipped"] is not None}
        lines += ["", *sorted(skipped)] if skipped else []
        lines.append("")
    return lines[:-1]


def _is_missing(item: Document | None) -> bool:
    return item is None or item["skipped"] is not None


def _charts(machines: Machines, name: str, text: str) -> list[str]:
    lines: list[str] = []
    for machine in machines:
        if (RECORDED / machine / f"{name}.png").exists():
            lines += ["", f"![{text}, {machine}](../images/performance/{machine}/{name}.png)"]
    return lines


def _head(cells: Sequence[str]) -> list[str]:
    return [_line(cells), _line(["---"] * len(cells))]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"

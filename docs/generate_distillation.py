"""Write docs/reference/distillation.md: a row for everything that can be distilled.

Names, options and needs come from the code, the measured effects from the last study
(docs/images/distillation_study.json), formulas and sources from docs/distillation_rows.py. Run
`make reference`; a test compares the page with all of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import distillation_prose as prose
import distillation_rows as rows
from distillation_rows import Row

import compression_plugins
from compression_plugins.distillation import (
    DistillationConfig,
    SelfKnowledgeDistillationLossConfig,
    TokenDistillationLossConfig,
)
from compression_plugins.distillation.criteria.catalog import CATALOG
from compression_plugins.distillation.criteria.schedules import SCHEDULES
from compression_plugins.distillation.criteria.tokens import DIVERGENCES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference" / "distillation.md"
RECORDED = ROOT / "docs" / "images" / "distillation_study.json"
# Of a run of `--strategies ...` on another machine, with a control of its own.
FURTHER = RECORDED.with_name("distillation_study_further.json")

sys.path.insert(0, str(ROOT / "examples"))

import distillation_summary  # noqa: E402  (examples are no package, and found after the line above)
from study_statistics import points  # noqa: E402  (examples, found like the import before)

Summary = dict[str, Any]
GIVEN_BY_LOOP = {"target": "labels (`target`)", "mask": "`mask`", "num_items": ""}
AGREEMENT = {
    "everything": "equal shapes; a projection bridges others",
    "positions": "equal places; interpolation bridges others, widths may differ",
    "samples": "the same samples only",
}


def page(summary: Summary | None) -> str:
    """Return the page, with the effects that the study's summary holds."""
    losses = {name: entry.function for name, entry in CATALOG.items()}
    parts = [
        prose.INTRODUCTION,
        "## Logits\n",
        "`KnowledgeDistillationLossConfig` (`type: knowledge_distillation`), the second entry of "
        "`loss_types`; options without `temperature` go into `loss_options`.\n",
        _table(rows.LOGITS, summary, losses, _logit_needs),
        "## Layers\n",
        "`IntermediateLayersKnowledgeDistillationLossConfig` (`type: intermediate_layers`), "
        "`loss_types`; the losses of logits are valid too. N is the batch.\n",
        _table(rows.LAYERS, summary, losses, _layer_needs, without=("temperature",)),
        "## Self-distillation\n",
        "`SelfKnowledgeDistillationLossConfig` (`type: self_distillation`), without a teacher; "
        "D is any loss of the two tables above, `KL` by default.\n",
        _table(
            rows.SELF,
            summary,
            {"self_distillation": SelfKnowledgeDistillationLossConfig},
            lambda name: "layers or named outputs of the student",
        ),
        "## Tokens\n",
        "`TokenDistillationLossConfig` (`type: tokens`), `divergence`, for language models. "
        "Options are fields of the config.\n",
        _table(
            rows.TOKENS,
            summary,
            DIVERGENCES,
            lambda name: _given_by_loop(DIVERGENCES[name]),
            without=_no_fields(TokenDistillationLossConfig, DIVERGENCES.values()),
        ),
        "## Schedules\n",
        "In the place of a temperature or a weight, by optimizer steps (`type: NAME` in recipes). "
        "Measured with `KL`.\n",
        _table(
            rows.SCHEDULES,
            summary,
            SCHEDULES,
            lambda name: "logits" if name == "adaptive" else "",
        ),
        "## Teachers\n",
        "Whom `DistillationConfig` asks. Measured with `KL` and soft targets.\n",
        _table(rows.TEACHERS, summary, _teacher_sources(), _teacher_needs),
        _measured_section(summary),
        prose.OWN_LOSS,
    ]
    return "\n".join(parts)


def _table(
    found: Sequence[Row],
    summary: Summary | None,
    functions: dict[str, Callable[..., Any]],
    needs: Callable[[str], str],
    without: Sequence[str] = (),
) -> str:
    lines = [
        _row(["name", "formula", "source", "options", "needs", "measured effect, points"]),
        _row(["---"] * 6),
    ]
    for row in found:
        effects = dict.fromkeys(
            (row.same_as and f"{row.same_as}: ") + effect(name, summary) for name in row.measured
        )
        cells = [
            f"`{row.name}`",
            row.formula,
            row.source,
            _options(functions.get(row.name), without),
        ]
        lines.append(_row([*cells, needs(row.name), "<br>".join(effects)]))
    return "\n".join(lines) + "\n"


def effect(name: str, summary: Summary | None) -> str:
    """Return the measured effect of one of the study's strategies."""
    entry = None if summary is None else _entry(name, summary)
    if entry is None:
        return "not measured"
    setting = distillation_summary.setting_text(entry["setting"])
    return f"{points(entry['gain'], '+')}, **{entry['verdict']}** ({entry['title']}: {setting})"


def _entry(name: str, summary: Summary) -> dict[str, Any] | None:
    """Return a strategy's entry, of the further run if the study itself has none."""
    entry: dict[str, Any] | None = summary["strategies"].get(name)
    if entry is None and "further" in summary:
        entry = summary["further"]["strategies"].get(name)
        return None if entry is None else {**entry, "title": f"second run; {entry['title']}"}
    return entry


def _measured_section(summary: Summary | None) -> str:
    if summary is None:
        return prose.UNMEASURED
    settings, count = summary["settings"], len(summary["strategies"]) - 1
    described = prose.MEASURED.format(
        epochs=settings["student_epochs"],
        seeds=len(summary["teacher"]["seeds"]),
        count=count,
        by_chance=f"{0.05 * count:.0f}",
        shift=prose.SHIFTED if settings["student_shift"] == 0 else prose.MOVED_ALIKE,
    )
    parts = [described, distillation_summary.to_markdown(summary)]
    if "further" in summary:
        # What it did not measure either is the first table.
        further = distillation_summary.to_markdown(summary["further"])
        parts += [prose.FURTHER, further.partition("\nNot measured")[0]]
    return "\n".join(parts)


def _no_fields(config: Any, functions: Iterable[Callable[..., Any]]) -> list[str]:
    """Return the parameters of functions that the config cannot set."""
    fields = {field.name for field in dataclasses.fields(config)}
    return [name for function in functions for name in _parameters(function) if name not in fields]


def _options(function: Callable[..., Any] | None, without: Sequence[str]) -> str:
    """Return the options with their defaults, of a function or a config class."""
    if function is None:
        return ""
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in ("student", "teacher", *GIVEN_BY_LOOP, *without):
            continue
        found.append(_option(name, parameter, function))
    return ", ".join(found)


def _option(name: str, parameter: inspect.Parameter, owner: Any) -> str:
    if parameter.default is inspect.Parameter.empty:
        return f"`{name}`"
    default = parameter.default
    if dataclasses.is_dataclass(owner):
        field = {item.name: item for item in dataclasses.fields(owner)}[name]
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
    return f"`{name}` = {default!r}"


def _logit_needs(name: str) -> str:
    return _given_by_loop(CATALOG[name].function) or "logits of the same classes"


def _layer_needs(name: str) -> str:
    return AGREEMENT[CATALOG[name].agreement]


def _given_by_loop(function: Callable[..., Any]) -> str:
    names = [text for name, text in GIVEN_BY_LOOP.items() if name in _parameters(function) and text]
    return ", ".join(names)


def _parameters(function: Callable[..., Any]) -> Iterable[str]:
    return inspect.signature(function).parameters


def _teacher_sources() -> dict[str, Callable[..., Any]]:
    names = [row.name for row in rows.TEACHERS if hasattr(compression_plugins, row.name)]
    return {name: getattr(compression_plugins, name) for name in names}


def _teacher_needs(name: str) -> str:
    return TEACHER_NEEDS[name]


TEACHER_NEEDS = {
    'teacher_outputs="model"': "`teacher_model`",
    'teacher_outputs="caller"': "`teacher_output` from the loop; no layers",
    'teacher_outputs="ema"': f"`ema_decay` = {DistillationConfig.ema_decay!r}",
    "EnsembleTeacher": "teachers of the same classes",
    "QuantizedTeacher": "a trained teacher",
    "TeacherCache": "`sample_ids` from the loop; no layers",
    "TeacherRuntime": "`teacher_model`",
}


def _row(cells: Iterable[str]) -> str:
    escaped = [cell.replace("|", r"\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def recorded() -> Summary | None:
    """Return the summary of the last study, or None."""
    if not RECORDED.exists():
        return None
    summary: Summary = json.loads(RECORDED.read_text(encoding="utf-8"))
    if FURTHER.exists():
        summary["further"] = json.loads(FURTHER.read_text(encoding="utf-8"))
    return summary


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(recorded()), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""docs/reference/distillation.md has a row for all there is, with the recorded figures."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from compression_plugins.distillation.config import SOURCES
from compression_plugins.distillation.criteria import CRITERIA
from compression_plugins.distillation.criteria.catalog import CATALOG
from compression_plugins.distillation.criteria.schedules import SCHEDULES
from compression_plugins.distillation.criteria.tokens import DIVERGENCES

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DOCS)
    return importlib.import_module("generate_distillation")


@pytest.fixture
def summary(generator: ModuleType) -> dict[str, Any]:
    """Of a study in which `KL` was measured, and `DKD` without a gain."""
    run = {"setting": {"temperature": 4, "weight": 0.9}, "best_epoch": 5}
    accuracies = {"control": [0.8, 0.81], "KL": [0.82, 0.83], "DKD": [0.8, 0.82]}
    tested = {
        name: [{**run, "test": value} for value in values] for name, values in accuracies.items()
    }
    settings = {"student_shift": 0, "student_epochs": 50}
    return generator.distillation_summary.summarize(tested, [0.9, 0.9], [], settings)


def _cells(page: str, section: str) -> dict[str, list[str]]:
    """Return name -> cells of the table in a section."""
    table = page.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {cells[0].strip("`"): cells for cells in rows}


def test_page_is_up_to_date(generator: ModuleType) -> None:
    expected = generator.page(generator.recorded())
    assert generator.PAGE.read_text(encoding="utf-8") == expected, "run `make reference`"


def test_every_row_has_a_measured_effect(generator: ModuleType) -> None:
    assert "not measured |" not in generator.PAGE.read_text(encoding="utf-8")


def test_there_is_a_row_for_all_that_configs_take(generator: ModuleType) -> None:
    page = generator.page(None)
    assert {*_cells(page, "Logits"), *_cells(page, "Layers")} == set(CATALOG)
    assert set(_cells(page, "Tokens")) == set(DIVERGENCES)
    assert set(_cells(page, "Schedules")) == set(SCHEDULES)
    teachers = _cells(page, "Teachers")
    assert {f'teacher_outputs="{source}"' for source in SOURCES} <= set(teachers)
    assert all(f"`type: {name}`" in page for name in CRITERIA)
    for section in ("Logits", "Layers", "Self-distillation", "Tokens", "Schedules", "Teachers"):
        for name, cells in _cells(page, section).items():
            assert len(cells) == 6, name
            assert cells[1], name
            assert cells[2], name
            assert cells[5].endswith("not measured"), name


def test_every_strategy_of_the_study_has_its_row(generator: ModuleType) -> None:
    strategies = importlib.import_module("distillation_strategies")
    rows = generator.rows
    tables = (rows.LOGITS, rows.LAYERS, rows.SELF, rows.TOKENS, rows.SCHEDULES, rows.TEACHERS)
    shown = {name for table in tables for row in table for name in row.measured}
    assert shown == set(strategies.BY_NAME) - {strategies.CONTROL}


def test_effects_are_those_of_the_study(generator: ModuleType, summary: dict[str, Any]) -> None:
    cells = _cells(generator.page(summary), "Logits")
    setting = "temperature 4, weight 0.9"
    assert f"+2.00 ± 0.00, **gain** (KL divergence: {setting})" in cells["KL"][5]
    # Differences of 0 and 1 points: mean 0.5, standard deviation 0.71, t = 12.7 for two seeds.
    assert cells["DKD"][5].startswith("+0.50 ± 6.35, **no gain**")
    assert cells["CE"][5] == "not measured"


def test_options_are_those_that_configs_take(generator: ModuleType) -> None:
    page = generator.page(None)
    assert _cells(page, "Logits")["DKD"][3:5] == [
        "`alpha` = 1.0, `beta` = 8.0, `temperature` = 1.0",
        "labels (`target`)",
    ]
    assert _cells(page, "Tokens")["forward_kl"][3] == "`temperature` = 1.0, `chunk_size` = None"
    assert _cells(page, "Layers")["contrastive"][3] == ""

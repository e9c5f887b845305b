"""The study: its statistics, its tables, and a short run of every arm."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("quantization_study")


def test_interval_is_students_t(study: ModuleType) -> None:
    study_statistics = importlib.import_module("study_statistics")
    # A textbook's numbers: mean 5, standard deviation 1, three values.
    assert study_statistics.interval([4.0, 5.0, 6.0]) == pytest.approx(
        (5.0, 4.303 / 3**0.5), rel=1e-3
    )
    assert study_statistics.interval([4.0])[1] == float("inf")


def test_differences_are_paired(study: ModuleType) -> None:
    runs = [dict.fromkeys(study.TITLES, 0.5 + seed / 10) for seed in range(3)]
    for run in runs:
        run["lsq_4_4"] += 0.01
    summary = study.summarize(runs)
    difference = summary["differences"]["lsq_4_4 - min_max_4_4"]
    assert difference == pytest.approx({"mean": 0.01, "half_width": 0.0}, abs=1e-9)
    assert summary["accuracy"]["lsq_4_4"]["half_width"] > 0.1
    assert dict(study.goals(summary)) == {
        "quantization-aware int8 is no worse than float32 within the interval": True,
        "learned scales beat min-max at 4/4 bits": True,
        "learned scales beat min-max at 4/4 bits beyond the interval": True,
    }
    for run in runs:
        run["qat_int8"] -= 0.02
        run["lsq_4_4"] -= 0.02
    assert not any(met for _, met in study.goals(study.summarize(runs)))


@pytest.mark.slow
def test_a_short_run_writes_everything(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    splits = study.fashion_mnist.load(None)

    def few(split: object) -> object:
        chosen = torch.arange(0, len(split.labels), max(1, len(split.labels) // 300))
        return study.Split(split.images[chosen], split.labels[chosen])

    small = study.Splits(few(splits.train), few(splits.validation), few(splits.test))
    monkeypatch.setattr(study.fashion_mnist, "load", lambda data: small)
    arguments = ["--seeds", "2", "--float-epochs", "1", "--arm-epochs", "2"]
    arguments += ["--output", str(tmp_path)]
    study.main(arguments)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["accuracy"]) == set(study.TITLES)
    assert (tmp_path / "summary.png").stat().st_size > 1000
    assert study.to_markdown(summary) == (tmp_path / "summary.md").read_text()
    with pytest.raises(SystemExit, match="other settings"):
        study.main([*arguments, "--judge-on", "validation"])


def test_the_recorded_study_has_three_seeds() -> None:
    recorded = json.loads((DOCS / "images" / "study.json").read_text(encoding="utf-8"))
    assert len(recorded["seeds"]) == 3

"""The distillation study: what it trains and chooses, its figures, and a short run of it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("distillation_study")


@pytest.fixture
def teachers(study: ModuleType) -> ModuleType:
    return importlib.import_module("distillation_teachers")


@pytest.fixture
def summary_of(study: ModuleType) -> ModuleType:
    return importlib.import_module("distillation_summary")


def _tested(name: str, accuracies: list[float]) -> list[dict[str, Any]]:
    return [{"test": value, "setting": {"weight": 1}, "best_epoch": 5} for value in accuracies]


def test_further_seeds_take_the_setting_that_validation_chose(study: ModuleType) -> None:
    run = study.Run
    names = ["control", "rkd_angle"]
    first = study.wanted(names, 3, {})
    assert set(first) == {run("control", 0, 0), run("rkd_angle", 0, 0), run("rkd_angle", 1, 0)}
    results = {run("rkd_angle", 0, 0): 0.7, run("rkd_angle", 1, 0): 0.8}
    more = set(study.wanted(names, 3, results)) - set(first)
    assert more == {run("rkd_angle", 1, 1), run("rkd_angle", 1, 2)}
    everything = {*first, *more, run("control", 0, 1), run("control", 0, 2)}
    assert study.count_runs(names, 3) == len(everything)


def test_a_check_takes_the_setting_of_the_strategy_that_it_has_to_equal(study: ModuleType) -> None:
    run = study.Run
    names = ["KL", "int8_teacher"]
    results = {run("KL", point, 0): accuracy for point, accuracy in enumerate([0.5, 0.7, 0.6])}
    checks = {found for found in study.wanted(names, 2, results) if found.strategy != "KL"}
    assert checks == {run("int8_teacher", 1, 0), run("int8_teacher", 1, 1)}
    assert run("int8_teacher", 1, 0).setting == run("KL", 1, 0).setting
    assert study.count_runs(names, 2) == len(study.wanted(names, 2, results))


def test_gains_are_paired_with_the_control(summary_of: ModuleType) -> None:
    tested = {
        "control": _tested("control", [0.80, 0.82, 0.84]),
        "KL": _tested("KL", [0.81, 0.83, 0.85]),
        "DKD": _tested("DKD", [0.80, 0.83, 0.84]),
        "CE": _tested("CE", [0.79, 0.81, 0.83]),
    }
    summary = summary_of.summarize(tested, [0.9, 0.9, 0.9], [], {"student_shift": 0})
    found = summary["strategies"]
    assert found["KL"]["gain"] == pytest.approx({"mean": 0.01, "half_width": 0.0}, abs=1e-9)
    assert [found[name]["verdict"] for name in tested] == ["", "gain", "no gain", "worse"]
    # Two degrees of freedom: differences 0, 1 and 0 points have the standard deviation 0.577.
    assert found["DKD"]["gain"]["half_width"] == pytest.approx(0.01 * 4.303 / 3, rel=1e-3)
    assert summary_of.ranked(summary) == ["KL", "DKD", "CE"]
    text = summary_of.to_markdown(summary)
    assert "attention transfer" in text.split("Not measured")[1]
    assert "| soft cross-entropy | weight 1 | 81.00 ± 4.97 | -1.00 ± 0.00 | worse |" in text


def test_variants_are_what_augmentation_makes(study: ModuleType) -> None:
    fashion_mnist = importlib.import_module("fashion_mnist")
    images = torch.randn(4, 1, 28, 28)
    for shift, count in ((0, 2), (1, 18)):
        variants = fashion_mnist.variants(images, shift).unflatten(0, (count, 4))
        found = set()
        for _ in range(40):
            augmented = fashion_mnist.augment(images, shift)
            equal = (variants == augmented).flatten(2).all(2)
            assert (equal.sum(0) == 1).all()
            found |= set(equal.nonzero()[:, 0].tolist())
        assert found == set(range(count))


def test_every_setting_builds_plugins_and_every_recording_is_named(study: ModuleType) -> None:
    strategies = importlib.import_module("distillation_strategies")
    teacher = importlib.import_module("models").teacher()
    for strategy in strategies.STRATEGIES:
        assert bool(strategy.grid) != bool(strategy.like)
        own = None if strategy.source in ("nobody", "itself", "caller") else teacher
        grid = strategy.grid or strategies.BY_NAME[strategy.like].grid
        for setting in grid:
            assert strategy.build(own, 10, setting) or strategy.name == strategies.CONTROL
        assert set(strategy.layers) <= {*strategies.BLOCKS, strategies.FEATURES}


def test_a_recorded_teacher_answers_as_the_teacher_does(
    teachers: ModuleType, tmp_path: Path
) -> None:
    setup = teachers.Setup(tmp_path, 0, 1, 1, images_per_class=3)
    for seed in (teachers.SECOND_TEACHER, 0):
        folder = teachers.teacher_folder(setup, seed)
        folder.mkdir(parents=True)
        _, teacher = teachers.demo.networks(seed)
        save_file(teacher.state_dict(), folder / "model.safetensors")
    assert not teachers.is_recorded(setup, 0, [])
    teachers.record_teacher(setup, 0, [])
    assert teachers.is_recorded(setup, 0, [])
    for form in teachers.FORMS:
        assert not teachers.is_recorded(setup, 0, [form])
    teachers.record_teacher(setup, 0, list(teachers.FORMS))
    assert teachers.is_recorded(setup, 0, list(teachers.FORMS))
    exact = np.load(folder / "logits.npy")
    for form in teachers.FORMS:
        other = np.load(folder / f"{form}_logits.npy")
        assert other.shape == exact.shape
        assert not np.array_equal(other, exact)
    recorded = teachers.RecordedTeacher(folder, "logits", ["block2", "flatten"])
    kept: dict[str, torch.Tensor] = {}
    for network, where in ((teacher.eval(), "live"), (recorded, "recorded")):
        for layer in ("block2", "flatten"):
            network.get_submodule(layer).register_forward_hook(
                lambda module, args, output, key=(where, layer): kept.update({key: output})
            )
    rows = torch.tensor([0, 59, 31, 7])
    images = teachers.variants(setup)
    assert len(images) == 60
    with torch.no_grad():
        torch.testing.assert_close(recorded(rows), teacher(images[rows]), rtol=1e-4, atol=1e-5)
    for layer in ("block2", "flatten"):
        torch.testing.assert_close(
            kept["recorded", layer], kept["live", layer], rtol=1e-4, atol=1e-5
        )


def test_a_short_run_writes_everything_and_a_second_one_trains_nothing(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "study"
    arguments = ["--seeds", "2", "--student-epochs", "1", "--teacher-epochs", "1"]
    arguments += ["--images-per-class", "30", "--strategies", "rkd_distance", "--workers", "1"]
    study.main([*arguments, "--output", str(folder)])
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["strategies"]) == {"control", "rkd_distance"}
    assert len(summary["runs"]) == 1 + 1 + 2 + 1
    # Test images judge the chosen runs only.
    assert sum("test" in run for run in summary["runs"]) == 4
    on_disk = [json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")]
    assert sorted(map(str, on_disk)) == sorted(map(str, summary["runs"]))
    assert (folder / "summary.png").read_bytes().startswith(b"\x89PNG")
    text = (folder / "summary.md").read_text()
    assert "relational, distances" in text
    assert text in capsys.readouterr().out

    written = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    study.main([*arguments, "--output", str(folder)])
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()} == written
    assert json.loads((folder / "summary.json").read_text()) == summary
    with pytest.raises(SystemExit, match="other settings"):
        study.main([*arguments, "--output", str(folder), "--student-shift", "1"])

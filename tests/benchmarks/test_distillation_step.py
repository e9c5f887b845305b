"""The benchmark runs, counts the teacher's passes and compares the losses; times prove nothing."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = Path(__file__).with_name("distillation_step.py")
    specification = importlib.util.spec_from_file_location("distillation_step", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "distillation_step", module)  # dataclasses look for it
    monkeypatch.setattr(sys, "path", [*sys.path])
    specification.loader.exec_module(module)
    return module


def test_it_runs_and_reports(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--cases", "demo", "--dtypes", "float32", "int8", "--steps", "4"]
    arguments += ["--live-steps", "2", "--samples", "24", "--batch-size", "8"]
    exact, rounded = script.main([*arguments, "--output", str(tmp_path / "benchmarks")])
    for result in (exact, rounded):
        assert (result.cached_teacher_forwards, result.live_teacher_forwards) == (0, 7)
        assert result.cached > 0
        assert result.cached_cpu > 0
    assert exact.largest_loss_difference == 0
    assert 0 < rounded.largest_loss_difference < 1e-2
    document = json.loads((tmp_path / "benchmarks" / "distillation_step.json").read_text())
    assert [item["dtype"] for item in document["results"]] == ["float32", "int8"]
    assert f"{exact.cached:.3f}" in capsys.readouterr().out

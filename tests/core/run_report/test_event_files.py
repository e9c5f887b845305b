"""What is read from TensorBoard's event files."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compression_manager.run_report import event_files
from compression_manager.run_report.curve import Curve
from compression_manager.run_report.event_files import holds_events, read_events
from compression_plugins.tensorboard.event_writer import EventWriter

RECIPE = {"seed": 3, "plugins": {"qat": {"bits": 8, "skip": ["head"], "on": True}}}


@pytest.fixture(autouse=True)
def one_second_per_event_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads a folder's files by name: the second of their creation comes first."""
    seconds = itertools.count(1_800_000_000)
    module = "tensorboard.summary.writer.event_file_writer.time"
    monkeypatch.setattr(module, SimpleNamespace(time=lambda: next(seconds)))


def _write(folder: Path, values: dict[int, float], first_step: int | None = 0) -> EventWriter:
    writer = EventWriter(folder, first_step=first_step)
    for step, value in values.items():
        writer.scalar("loss/total", value, step)
    return writer


def test_points_of_one_file(tmp_path: Path) -> None:
    _write(tmp_path, {1: 0.5, 2: 0.25}).close()
    events = read_events(tmp_path)
    assert events.curves == {"loss/total": Curve((1, 2), (0.5, 0.25))}
    assert events.recipe == {}
    assert events.seconds is not None


def test_resumed_run_supersedes_the_points_that_it_repeats(tmp_path: Path, caplog: Any) -> None:
    _write(tmp_path, {1: 1.0, 2: 2.0, 3: 3.0}).close()
    with caplog.at_level(logging.INFO):
        _write(tmp_path, {3: 30.0, 4: 40.0}, first_step=3).close()
        events = read_events(tmp_path)
    assert events.curves["loss/total"] == Curve((1, 2, 3, 4), (1.0, 2.0, 30.0, 40.0))
    assert not [item for item in caplog.records if item.name == "tensorboard"]


def test_recipe_is_what_the_plugin_wrote(tmp_path: Path) -> None:
    writer = _write(tmp_path, {1: 1.0})
    writer.hyperparameters(RECIPE, {"loss/total": 1.0})
    writer.close()
    assert read_events(tmp_path).recipe == {
        "seed": 3,
        "plugins.qat.bits": 8,
        "plugins.qat.skip": '["head"]',
        "plugins.qat.on": True,
    }


def test_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    _write(tmp_path, {step: float(step) for step in range(1, 10)}).close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    curve = read_events(tmp_path).curves["loss/total"]
    assert curve.values == tuple(float(step) for step in range(1, len(curve.steps) + 1))
    assert 6 <= len(curve.steps) <= 8


def test_long_curve_is_sampled_and_keeps_its_last_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_files, "MAX_POINTS", 10)
    _write(tmp_path, {step: float(step) for step in range(1, 51)}).close()
    curve = read_events(tmp_path).curves["loss/total"]
    assert len(curve.steps) == 10
    assert curve.last == 50.0


def test_only_event_files_count(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    assert not holds_events(tmp_path)
    _write(tmp_path, {1: 1.0}).close()
    assert holds_events(tmp_path)

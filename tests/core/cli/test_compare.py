"""`compression-manager compare`: results and differing options of several runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from compression_manager.cli import main
from written_runs import Page, Written, write_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> list[Written]:
    root = tmp_path_factory.mktemp("runs")
    return [
        write_run(root / "warm"),
        write_run(root / "cool", temperature=1.0, accuracies=(0.5, 0.25)),
        write_run(root / "alone", tensorboard=False),
    ]


def _compared(capsys: Any, *arguments: object) -> list[dict[str, Any]]:
    assert main(["compare", *map(str, arguments), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return list(json.loads(printed.out)["runs"])


def test_results_are_those_of_the_runs(runs: list[Written], capsys: Any) -> None:
    found = _compared(capsys, *(run.folder for run in runs))
    assert [item["run"] for item in found] == [str(run.folder) for run in runs]
    results = [item["results"] for item in found]
    assert [item["optimizer steps"] for item in results] == [12, 8, 12]
    assert [item["evaluations"] for item in results] == [3, 2, 3]
    assert [item["best accuracy"] for item in results] == [0.75, 0.5, 0.75]
    assert [item["best accuracy at step"] for item in results] == [8, 4, 8]
    assert [item["last accuracy"] for item in results] == [0.5, 0.25, 0.5]
    assert [item["last gap"] for item in results] == ["nan"] * 3
    assert [item["quantized layers"] for item in results] == [2, 2, 2]
    for run, item in zip(runs, results, strict=True):
        assert run.report is not None
        assert item["bytes before"] == run.report.bytes_before
        assert item["bytes after"] == run.report.bytes_after
    for run, item in zip(runs[:2], results, strict=False):
        assert item["loss/total"] == pytest.approx(run.losses[-1], rel=1e-6)
    assert results[2]["loss/total"] is None


def test_only_options_that_differ_are_listed(runs: list[Written], capsys: Any) -> None:
    found = _compared(capsys, runs[0].folder, runs[1].folder)
    assert [item["options"] for item in found] == [
        {
            "plugins.distillation.criterion.temperature": temperature,
            "plugins.checkpoint.directory": str(run.folder / "checkpoints"),
            "plugins.tensorboard.directory": str(run.folder / "tensorboard"),
        }
        for run, temperature in zip(runs[:2], (4.0, 1.0), strict=True)
    ]


def test_option_that_a_run_lacks(runs: list[Written], capsys: Any) -> None:
    found = _compared(capsys, runs[0].folder, runs[2].folder)
    assert found[0]["options"]["plugins.tensorboard.detail_every_steps"] == 1
    assert found[1]["options"]["plugins.tensorboard.detail_every_steps"] is None


def test_a_run_read_from_event_files_has_the_same_recipe(runs: list[Written], capsys: Any) -> None:
    found = _compared(capsys, runs[0].folder, runs[0].folder / "tensorboard")
    assert [item["options"] for item in found] == [{}, {}]


def test_table_is_aligned_and_says_the_same(runs: list[Written], capsys: Any) -> None:
    folders = [str(run.folder) for run in runs]
    assert main(["compare", *folders]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == folders
    starts = [lines[0].index(folder) for folder in folders]
    rows = {}
    for line in lines[1:]:
        ends = [*starts[1:], len(line)]
        rows[line[: starts[0]].strip()] = [
            line[start:end].strip() for start, end in zip(starts, ends, strict=True)
        ]
    assert rows["optimizer steps"] == ["12", "8", "12"]
    assert rows["best accuracy"] == ["0.75", "0.5", "0.75"]
    assert rows["loss/total"][2] == "-"
    assert rows["plugins.distillation.criterion.temperature"] == ["4", "1", "4"]
    assert not any(line != line.rstrip() for line in lines)


def test_page_draws_every_run(runs: list[Written], tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "new" / "comparison.html"
    folders = [str(runs[index].folder) for index in (2, 0, 1)]
    assert main(["compare", *folders, "--html", str(output)]) == 0
    assert "optimizer steps" in capsys.readouterr().out
    page = Page(output.read_text(encoding="ascii"))
    assert {*folders, "task", "distillation/KL", "accuracy"} <= set(page.texts)
    assert not any(attributes.keys() & {"src", "href"} for _, attributes in page.tags)
    # The first run has no losses; the others keep their colors there.
    keys = [attributes["class"] for tag, attributes in page.tags if tag == "span"]
    assert [keys.count(f"key c{index}") for index in range(3)] == [2, 5, 5]


@pytest.mark.parametrize("second", ["none", "damaged"])
def test_run_that_cannot_be_read_exits_with_1(
    runs: list[Written], tmp_path: Path, capsys: Any, second: str
) -> None:
    if second == "damaged":
        broken = write_run(tmp_path / "damaged", tensorboard=False, accuracies=(0.5,))
        (broken.folder / "checkpoints" / "step-00000004" / "state.json").write_text("{}")
    page = tmp_path / "page.html"
    arguments = ["compare", str(runs[0].folder), str(tmp_path / second), "--html", str(page)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(tmp_path / second) in printed.err
    assert not page.exists()


def test_closed_pipe_is_no_error(runs: list[Written]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "compression_manager", "compare", str(runs[0].folder)]
    try:
        ended = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    finally:
        os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == 0

"""`compression-manager report`: the page says what the run was, and stands alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from compression_manager.cli import main
from compression_manager.run_report.text import number, size
from compression_manager.state import read_checkpoint
from written_runs import ACCURACIES, STEPS_PER_EPOCH, Page, Written, write_run

STEPS = STEPS_PER_EPOCH * len(ACCURACIES)
NASTY = "<img src=http://x.invalid/ onerror=alert(1)>&\"'"


@pytest.fixture(scope="module")
def written(tmp_path_factory: Any) -> Written:
    return write_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def folder(written: Written, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written.folder, tmp_path / "demo"))


def _text(capsys: Any, *arguments: object) -> str:
    assert main(["report", *map(str, arguments), "-o", "-"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return str(printed.out)


def _error(capsys: Any, *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    return str(printed.err)


def test_page_refers_to_nothing_outside(folder: Path, capsys: Any) -> None:
    text = _text(capsys, folder)
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "base", "a", "use", "image"}
    for _, attributes in page.tags:
        assert not attributes.keys() & {"src", "href", "xlink:href", "srcset"}
    assert "url(" not in text
    assert "@import" not in text
    assert "http" not in text
    assert text.isascii()


def test_summary_is_that_of_the_run(written: Written, folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder))
    report = written.report
    assert report is not None
    both = [size(count) for count in (report.bytes_before, report.bytes_after)]
    unbroken = [text.replace(" ", "\N{NO-BREAK SPACE}") for text in both]
    sizes = " \N{RIGHTWARDS ARROW} ".join(unbroken)
    assert page.after("Size of the tensors") == sizes
    assert page.after("Quantized layers") == "2 of 2"
    assert page.after("Best accuracy") == "0.75"
    assert page.after("0.75") == "at step 8, higher is better; last 0.5"
    assert page.after("Optimizer steps") == str(STEPS)
    names = page.texts[page.texts.index("Plugins") + 2]
    assert names == "distillation, qat, checkpoint, tensorboard, calibration"


def test_loss_is_that_of_the_loop(written: Written, folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder))
    legend = page.texts.index("Ranges of the quantizers")
    shown = page.texts[:legend]
    assert {"task", "distillation/KL", "total"} <= set(shown)
    last = shown[len(shown) - 1 - shown[::-1].index("total") + 1]
    assert float(last) == pytest.approx(written.losses[-1], rel=1e-3)
    for step, loss in enumerate(written.losses, start=1):
        (point,) = (
            text for text in shown if text.endswith(f" at step {step}") and "total:" in text
        )
        assert float(point.split()[1]) == pytest.approx(loss, rel=1e-3)


def test_layers_are_those_of_the_report(written: Written, folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder))
    start = page.texts.index("Layers")
    assert written.report is not None
    for layer in written.report.layers:
        row = page.texts.index(layer.name, start)
        assert page.texts[row + 1 : row + 6] == [
            layer.kind,
            "8",
            "8",
            size(layer.bytes_before),
            size(layer.bytes_after),
        ]
        assert layer.detail in page.texts[row:]
    record = read_checkpoint(folder / "checkpoints" / f"step-{STEPS:08d}")["model"]
    scale = record["0.input_quantizer.scale"]
    assert number(float(scale)) in page.texts


def test_recipe_and_environment(folder: Path, capsys: Any) -> None:
    text = _text(capsys, folder)
    page = Page(text)
    recipe = read_checkpoint(folder / "checkpoints" / f"step-{STEPS:08d}")["recipe"]
    assert yaml.safe_load(page.after("Recipe")) == yaml.safe_load(yaml.safe_dump(recipe))
    assert page.after("torch") == torch.__version__
    assert page.after("threads") == str(torch.get_num_threads())


def test_notes_of_plugins_are_shown(folder: Path, capsys: Any) -> None:
    assert "memory: student" in _text(capsys, folder)


def test_checkpoints_alone(written: Written, folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder / "checkpoints"))
    assert page.after("Best accuracy") == "0.75"
    assert page.after("Loss terms").startswith("Not recorded: checkpoints hold no losses.")
    # Ranges come from the three checkpoints.
    assert "0/input" in page.texts
    shutil.rmtree(folder / "tensorboard")
    again = Page(_text(capsys, folder))
    assert (
        again.texts[again.texts.index("Best accuracy") :]
        == (page.texts[page.texts.index("Best accuracy") :])
    )


def test_one_checkpoint(folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder / "checkpoints" / f"step-{STEPS_PER_EPOCH:08d}"))
    assert page.after("Optimizer steps") == str(STEPS_PER_EPOCH)


def test_event_files_alone(written: Written, folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder / "tensorboard"))
    assert page.after("Best accuracy") == "0.75"
    assert page.after("Optimizer steps") == str(STEPS)
    assert page.after("Layers").startswith("Not recorded")
    assert page.after("Environment").startswith("Not recorded")
    assert yaml.safe_load(page.after("Recipe"))["plugins.qat.weight.bits"] == 8


def test_page_lies_in_the_run_unless_told_otherwise(folder: Path, capsys: Any) -> None:
    page = _text(capsys, folder)
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    assert (folder / "report.html").read_text(encoding="ascii") == page
    other = folder.parent / "new" / "page.html"
    assert main(["report", str(folder), "--output", str(other)]) == 0
    assert capsys.readouterr().out == f"{other}\n"
    assert other.read_text(encoding="ascii") == page


def test_older_page_stays_whole_if_writing_fails(
    folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = folder / "report.html"
    page.write_text("older")

    def full(*arguments: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert f"cannot write {page}: no space left" in _error(capsys, folder)
    assert page.read_text() == "older"
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "report.html",
        "tensorboard",
    ]


def test_output_that_is_a_folder(folder: Path, capsys: Any) -> None:
    assert "is a folder; name a file in it" in _error(capsys, folder, "-o", folder)


def test_all_texts_of_the_run_are_escaped(tmp_path: Path, capsys: Any) -> None:
    model = nn.Sequential()
    nasty = NASTY.replace(".", "")
    model.add_module(nasty, nn.Linear(6, 4))
    run = write_run(tmp_path / "<b>run", metric=nasty, model=model)
    text = _text(capsys, run.folder)
    page = Page(text)
    assert not {"img", "b>run"} & {tag for tag, _ in page.tags}
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert "<b>run" in page.texts
    assert nasty in page.texts
    assert f"Best {nasty}" in page.texts


def test_several_runs_are_refused(folder: Path, capsys: Any) -> None:
    shutil.copytree(folder, folder.parent / "other")
    error = _error(capsys, folder.parent)
    assert "holds checkpoints of several runs" in error
    assert f"{folder}/checkpoints, {folder.parent}/other/checkpoints" in error


def test_event_files_of_another_run_are_refused(folder: Path, capsys: Any) -> None:
    (folder / "tensorboard").rename(folder / "logs")
    error = _error(capsys, folder)
    assert "holds parts of several runs" in error
    assert f"{folder}/logs" in error
    assert not (folder / "report.html").exists()


def test_the_recipe_chooses_among_event_files(folder: Path, capsys: Any) -> None:
    shutil.copytree(folder / "tensorboard", folder / "somebody_elses")
    assert f"event files in {folder}/tensorboard." in _text(capsys, folder)
    shutil.rmtree(folder / "checkpoints")
    assert "event files of several runs" in _error(capsys, folder)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("none", "does not exist"),
        ("file", "is a file"),
        ("empty", "holds no run; it holds nothing. Looked, up to 3 folders deep, for checkpoints"),
        ("other", "holds no run; it holds notes.txt"),
    ],
)
def test_what_is_no_run_exits_with_1(tmp_path: Path, capsys: Any, name: str, reason: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("text")
    error = _error(capsys, tmp_path / name)
    assert f"{tmp_path / name} {reason}" in error


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_damaged_checkpoint_exits_with_1(folder: Path, capsys: Any, name: str) -> None:
    path = folder / "checkpoints" / f"step-{STEPS:08d}" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert str(path) in _error(capsys, folder)
    assert not (folder / "report.html").exists()


def test_missing_newest_checkpoint_exits_with_1(folder: Path, capsys: Any) -> None:
    shutil.rmtree(folder / "checkpoints" / f"step-{STEPS:08d}")
    assert "is the newest checkpoint" in _error(capsys, folder)


def test_closed_pipe_is_no_error(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "compression_manager", "report", str(folder), "-o", "-"]
    try:
        ended = subprocess.run(
            command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False, timeout=120
        )
    finally:
        os.close(writing)
    assert ended.stderr == ""
    assert ended.returncode == 0


def test_values_that_are_not_finite_are_counted(folder: Path, capsys: Any) -> None:
    page = Page(_text(capsys, folder))
    assert ", 3 not finite" in page.texts
    assert not re.search(r'd="[^"]*(nan|inf)', _text(capsys, folder))


def test_reading_changes_nothing(folder: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    _text(capsys, folder)
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before

"""The demo script: what it writes, that it skips what is finished, and that it resumes."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "distill_and_quantize.yaml"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script with two epochs on a few images, everything else as in `make demo`."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    names = ("distill_and_quantize", "demo_summary", "fashion_mnist", "models")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import demo_summary
    import distill_and_quantize
    import fashion_mnist

    full = fashion_mnist.load()

    def few(split: Any, count: int) -> Any:
        chosen = torch.linspace(0, len(split) - 1, count).long()
        return fashion_mnist.Split(split.images[chosen], split.labels[chosen])

    splits = fashion_mnist.Splits(
        few(full.train, 256), few(full.validation, 60), few(full.test, 60)
    )
    monkeypatch.setattr(fashion_mnist, "load", lambda data: splits)
    for name in ("TEACHER_TRAINING", "STUDENT_TRAINING"):
        short = dataclasses.replace(getattr(distill_and_quantize, name), epochs=2, batch_size=64)
        monkeypatch.setattr(distill_and_quantize, name, short)
    add_latency = demo_summary.add_latency
    monkeypatch.setattr(
        demo_summary, "add_latency", lambda results, images: add_latency(results, images, rounds=2)
    )
    return distill_and_quantize


def _run(demo: ModuleType, output: Path, *options: str) -> dict[str, Any]:
    demo.main([str(RECIPE), "--output", str(output), *options])
    return json.loads((output / "summary.json").read_text())


def test_writes_everything_and_skips_what_is_finished(
    demo: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = _run(demo, tmp_path / "run", "--seeds", "2")
    for name in ("teacher", "student", "distilled", "qat", "distilled_qat", "int8"):
        entry = summary[name]
        assert 0 <= entry["accuracy"] <= 1
        assert entry["latency_ms"]["1"] > 0
        assert entry["latency_ms"]["64"] > 0
        assert Path(entry["path"]).exists()
        singles = [run[name]["accuracy"] for run in summary["seeds"]]
        assert entry["accuracy"] == pytest.approx(sum(singles) / 2)
    assert summary["teacher"]["parameters"] >= 10 * summary["student"]["parameters"]
    saved = sum(file.stat().st_size for file in Path(summary["int8"]["path"]).iterdir())
    assert saved == summary["seeds"][0]["int8"]["bytes"]
    assert (tmp_path / "run" / "summary.png").read_bytes().startswith(b"\x89PNG")
    first = capsys.readouterr().out
    assert "| int8 |" in first
    assert "skipped" not in first

    again = _run(demo, tmp_path / "run", "--seeds", "2")
    assert capsys.readouterr().out.count("skipped") == 10
    assert again["int8"]["accuracy"] == summary["int8"]["accuracy"]


@pytest.mark.slow
def test_students_start_equal_and_plugins_make_the_difference(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    prepare = demo.prepare_compression

    def recording(model: torch.nn.Module, *arguments: Any, **options: Any) -> Any:
        starts.append({name: value.clone() for name, value in model.state_dict().items()})
        manager = prepare(model, *arguments, **options)
        # Each training draws something else: equal starts must not come from equal random states.
        torch.rand(len(starts))
        return manager

    monkeypatch.setattr(demo, "prepare_compression", recording)
    _run(demo, tmp_path / "run")
    _, first, *others = starts
    assert len(others) == 3
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
    folder = tmp_path / "run" / "seed-0"
    states = {
        name: load_file(folder / name / "model.safetensors")
        for name in ("student", "distilled", "qat", "distilled_qat")
    }
    weight = "block1.conv.weight"
    assert not torch.equal(states["student"][weight], states["distilled"][weight])
    assert not torch.equal(states["qat"][weight], states["distilled_qat"][weight])
    quantized = [name for name in states if any("quantizer" in key for key in states[name])]
    assert quantized == ["qat", "distilled_qat"]
    progress = capsys.readouterr().err
    for name in ("teacher", *states):
        terms = "loss/task .*loss/distillation/KL .*" if "distilled" in name else "loss/task .*"
        assert re.search(f"^{name}, epoch 1: {terms}loss/total", progress, flags=re.MULTILINE)
        assert list((folder / name / "tensorboard").glob("events.out.tfevents.*"))
        assert (folder / name / "checkpoints" / "index.json").is_file()


def test_the_folder_that_was_given_is_read(demo: ModuleType, tmp_path: Path) -> None:
    read: list[Any] = []

    def load(folder: Any) -> None:
        read.append(folder)
        raise KeyboardInterrupt

    demo.fashion_mnist.load = load
    for options in ([], ["--data", str(tmp_path)]):
        with pytest.raises(KeyboardInterrupt):
            demo.main([str(RECIPE), "--output", str(tmp_path / "run"), *options])
    assert read == [None, tmp_path]


@pytest.mark.slow
def test_interrupted_run_resumes_to_the_same_bits(
    demo: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = _run(demo, tmp_path / "whole")

    calls = 0
    accuracy = demo.accuracy

    validation = demo.fashion_mnist.load(None).validation

    def interrupt(model: torch.nn.Module, split: Any) -> float:
        nonlocal calls
        assert split is validation  # test images choose nothing
        calls += 1
        if calls == 6:  # the second epoch of the third of five trainings
            raise KeyboardInterrupt
        return accuracy(model, split)

    monkeypatch.setattr(demo, "accuracy", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _run(demo, tmp_path / "parts")
    capsys.readouterr()
    actual = _run(demo, tmp_path / "parts")
    output = capsys.readouterr().out
    assert output.count("skipped") == 2
    assert "resuming at epoch 1 of 2" in output
    for name in ("teacher", "student", "distilled", "qat", "distilled_qat"):
        assert actual[name]["accuracy"] == expected[name]["accuracy"]
        one = load_file(tmp_path / "whole" / "seed-0" / name / "model.safetensors")
        other = load_file(tmp_path / "parts" / "seed-0" / name / "model.safetensors")
        assert all(torch.equal(one[key], other[key]) for key in one), name


@pytest.mark.slow
def test_other_settings_do_not_mix(demo: ModuleType, tmp_path: Path) -> None:
    _run(demo, tmp_path / "run")
    other = tmp_path / "recipe.yaml"
    other.write_text(RECIPE.read_text() + "\n# changed\n")
    with pytest.raises(SystemExit, match="other settings"):
        demo.main([str(other), "--output", str(tmp_path / "run")])

"""The benchmark of the teacher's options runs, and its figures are measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("teacher_runtime.py")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(SCRIPT.parents[2] / "examples")
    specification = importlib.util.spec_from_file_location("teacher_runtime_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_figure_is_shown_and_written(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.delitem(benchmark.TEACHERS, "transformer")
    data = benchmark.fashion_mnist
    split = data.Split(torch.randn(8, 1, 28, 28), torch.arange(8))
    monkeypatch.setattr(data, "load", lambda: data.Splits(split, split, split))
    threads = torch.get_num_threads()
    benchmark.main(
        "--options int8 channels_last --rounds 2 --batch-size 2 --train-images 4 --images 4 "
        f"--epochs 1 --threads {threads} --device cpu --output {tmp_path}".split()
    )
    rows = json.loads((tmp_path / "summary.json").read_text())["teachers"]["CNN"]
    assert list(rows) == ["float32", "int8", "channels_last"]
    shown = capsys.readouterr().out
    for name, row in rows.items():
        assert f"| {name} | {row['ms']:.1f} |" in shown
        assert 0 < row["lowest_ratio"] <= row["ratio"] <= row["highest_ratio"]
    baseline, int8 = rows["float32"], rows["int8"]
    assert (baseline["ratio"], baseline["kl"], baseline["top1_agreement"]) == (1, 0, 1)
    assert int8["megabytes"] < 0.3 * baseline["megabytes"]
    assert int8["kl"] > 0

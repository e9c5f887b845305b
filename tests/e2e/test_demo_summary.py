"""The demo's table, bars and latency, from figures that are known beforehand."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
MODELS = ("teacher", "student", "distilled", "qat", "distilled_qat", "int8")


@pytest.fixture
def demo_summary(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("demo_summary")


def run(seed: int, **accuracies: float) -> dict[str, dict[str, Any]]:
    """The entries of one seed; the teacher is 0.9 accurate and takes 1000 bytes."""
    entries = {
        name: {
            "accuracy": 0.8,
            "parameters": 50,
            "bytes": 200,
            "latency_ms": {"1": 0.5, "64": 8.0},
            "path": f"seed-{seed}/{name}",
        }
        for name in MODELS
    }
    large = {"accuracy": 0.9, "parameters": 500, "bytes": 1000, "latency_ms": {"1": 1, "64": 4.0}}
    entries["teacher"] |= large
    entries["int8"] |= {"bytes": 40, "disagreement_with_fake_quantized": 0.0005 * seed}
    for name, accuracy in accuracies.items():
        entries[name]["accuracy"] = accuracy
    return entries


def written(
    demo_summary: ModuleType, output: Path, *runs: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    output.mkdir(exist_ok=True)
    demo_summary.write(list(runs), output)
    table = (output / "summary.md").read_text()
    return json.loads((output / "summary.json").read_text()), table.splitlines()


def test_means_and_spread_over_seeds(
    demo_summary: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [run(0, int8=0.88, distilled=0.84), run(1, int8=0.90, distilled=0.86)]
    summary, table = written(demo_summary, tmp_path, *runs)
    assert [name for name in summary if name in MODELS] == list(MODELS)
    assert summary["seeds"] == runs
    assert summary["int8"]["accuracy"] == pytest.approx(0.89)
    assert summary["int8"]["accuracy_spread"] == pytest.approx(0.0141421, rel=1e-4)
    assert summary["int8"]["path"] == "seed-0/int8"
    assert summary["bars"] == pytest.approx(
        {
            "int8_to_teacher_accuracy": 0.89 / 0.9,
            "teacher_to_int8_bytes": 25.0,
            "distilled_minus_student_accuracy": 0.05,
            "int8_disagreement_with_fake_quantized": 0.0005,
        }
    )
    assert "mean of 2 seeds" in table[0]
    row = next(line for line in table if line.startswith("| int8 "))
    assert row.split(" | ") == [
        "| int8",
        "89.00% ± 1.41% (0.989)",
        "50 (1/10.0)",
        "40 (1/25.0)",
        "0.50 (1/2.0)",
        "8.00 (2.0) |",
    ]
    assert "\n".join(table) in capsys.readouterr().out
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_spread(demo_summary: ModuleType, tmp_path: Path) -> None:
    summary, table = written(demo_summary, tmp_path, run(0))
    assert summary["int8"]["accuracy_spread"] is None
    assert "1 seed" in table[0]
    assert "±" not in "\n".join(table)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"int8": 0.882, "distilled": 0.801}, []),
        ({"int8": 0.881, "distilled": 0.801}, ["int8 accuracy"]),
        ({"int8": 0.9, "distilled": 0.8}, ["distilled - alone"]),
    ],
)
def test_a_missed_bar_is_reported_as_it_is(
    demo_summary: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, float],
    missed: list[str],
) -> None:
    written(demo_summary, tmp_path, run(0, **change))
    lines = [line for line in capsys.readouterr().out.splitlines() if "(goal " in line]
    assert [line.split()[0] for line in lines].count("MISS") == len(missed)
    assert all(any(f"MISS  {text}" in line for line in lines) for text in missed)


def test_bars_of_size_and_disagreement(demo_summary: ModuleType) -> None:
    bars = {
        "int8_to_teacher_accuracy": 1.0,
        "teacher_to_int8_bytes": 19.99,
        "distilled_minus_student_accuracy": 0.1,
        "int8_disagreement_with_fake_quantized": 0.0011,
    }
    met = [line.split()[0] for line in demo_summary.describe_bars(bars)]
    assert met == ["met", "MISS", "met", "MISS"]
    bars |= {"teacher_to_int8_bytes": 20.0, "int8_disagreement_with_fake_quantized": 0.001}
    assert not any("MISS" in line for line in demo_summary.describe_bars(bars))


def test_latency_is_the_median_at_batch_1_and_64(
    demo_summary: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    sizes: list[int] = []
    seconds = iter([0.001, 0.002, 0.009, 0.040, 0.010, 0.020])

    def network(inputs: torch.Tensor) -> None:
        nonlocal now
        sizes.append(len(inputs))
        now += next(seconds)

    monkeypatch.setattr(demo_summary, "_load", lambda name, entry: network)
    monkeypatch.setattr(demo_summary.time, "perf_counter", lambda: now)
    results: dict[str, Any] = {"student": {}}
    demo_summary.add_latency(results, torch.zeros(64, 1), rounds=3)
    assert sizes == [1] * 3 + [64] * 3
    assert results["student"]["latency_ms"] == pytest.approx({"1": 2.0, "64": 20.0})

"""The performance page says what the recorded benchmarks say, and nothing by hand."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FEATURES = {"AVX2": True, "AVX512": True, "VNNI": True, "AMX-bf16": False}
MACHINE = {
    "processor": "Test",
    "cpu_count": 2,
    "threads": 2,
    "torch": "2.13.0",
    "python": "3.11.7",
    "features": FEATURES,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = ROOT / "docs" / "update_performance.py"
    specification = importlib.util.spec_from_file_location("update_performance", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    specification.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(script):
    page = script.PAGE.read_text(encoding="utf-8")
    for name, content in script.blocks(script.recorded(script.RECORDED)).items():
        assert script.replaced(page, name, content) == page, f"{name}: `make performance`"


def test_results_are_copied_and_written(script, tmp_path, monkeypatch, capsys):
    results, recorded, page = tmp_path / "results", tmp_path / "recorded", tmp_path / "page.md"
    results.mkdir()
    (results / "hooks.json").write_text(json.dumps(hooks()))
    (results / "unrelated.json").write_text("{}")
    shutil.copyfile(script.PAGE, page)
    for name, value in (("RECORDED", recorded), ("PAGE", page), ("ROOT", tmp_path)):
        monkeypatch.setattr(script, name, value)
    script.main(["--machine", "amx", "--results", str(results)])
    assert [path.name for path in (recorded / "amx").iterdir()] == ["hooks.json"]
    text = page.read_text()
    assert "- **amx**: Test, 2 cores, 2 threads used; has AVX2, AVX512, VNNI" in text
    assert "0 plugins 17.0 (16.0 to 18.0; by CPU 16.5)" in text
    assert "- Convert, in milliseconds: 10 layers 3, 100 layers 40; exponent 1.10" in text


def test_what_was_not_measured_is_said_and_each_machine_has_a_table(script):
    with_skipped = {"fast": {"training_step": training(0.85), "roofline": roofline()}}
    blocks = script.blocks(with_skipped | {"old": {"training_step": training(1.25)}})
    assert "Not measured yet." in blocks["peers"]
    fast, old = blocks["training"].split("old:")
    for table, shown in ((fast, "0.850 (0.850 to 0.850), bar 0.85"), (old, "1.250 (1.250")):
        assert "|  | encoder |" in table
        assert f"| native | {shown}" in table
        assert "| native, bfloat16 backward | - |" in table
        assert "- native, bfloat16 backward: no AMX." in table
    assert "| native | 200 MiB, 0.78 |" in blocks["saved"]


def test_the_limit_is_the_largest_part(script):
    blocks = script.blocks({"fast": {"training_step": training(0.85), "roofline": roofline()}})
    lines = blocks["limits"].splitlines()
    # 10 * 10^9 operations forward and 20 backward at 100 (float32) and 1000 (int8), 1 GB at 10.
    assert "| float32 | 100 | 200 | 100 | 400 | 500 | backward products |" in lines
    assert "| native | 10 | 200 | 100 | 310 | 425 | backward products |" in lines
    types = sys.modules["performance_tables"]._types
    assert types("bfloat16", FEATURES) == ("int8", "bfloat16")
    old = {"AVX2": True, "AVX512": False, "VNNI": False}
    for variant, features, forward in (
        ("auto-torch", FEATURES, "int8"),
        ("auto-native", old, "int8"),
        ("distilled-native", old, "int8"),
        ("auto-torch", old, "float32"),
        ("auto-native", old | {"AVX512": True}, "float32"),
        ("distilled-fake", FEATURES, "float32"),
    ):
        assert types(variant, features) == (forward, "float32")


def test_the_profile_of_inference_is_a_table_with_what_it_says(script):
    measured = {"title": "int8, eager", "parts": {"all": 12.34, "rest": 0.5}, "skipped": None}
    left_out = {"title": "int8, OpenVINO", "skipped": "ImportError: no openvino"}
    results = [{"model": "encoder", **item} for item in (measured, left_out)]
    document = {"machine": MACHINE, "results": results, "findings": {"encoder": "encoder: fast."}}
    blocks = script.blocks({"fast": {"inference_profile": document}, "old": {"hooks": hooks()}})
    assert blocks["inference-profile"].splitlines() == [
        "",
        "fast, encoder, in milliseconds:",
        "",
        "| route | all | rest |",
        "| --- | --- | --- |",
        "| int8, eager | 12.3 | 0.5 |",
        "",
        "- int8, OpenVINO: ImportError: no openvino.",
        "",
        "encoder: fast.",
    ]


def training(ratio: float) -> dict[str, Any]:
    def item(name: str, title: str, value: float, skipped: str | None = None) -> dict[str, Any]:
        return {
            "model": "encoder",
            "variant": name,
            "title": title,
            "ratio": value,
            "quartiles": [value, value],
            "milliseconds": 500 * value,
            "bar": 0.85 if name == "auto-native" else None,
            "saved_mib": 200.0,
            "saved_ratio": 0.78,
            "skipped": skipped,
        }

    results = [
        item("float32", "float32", 1.0),
        item("auto-native", "native", ratio),
        item("bfloat16", "native, bfloat16 backward", 0.0, "no AMX"),
    ]
    return {"machine": MACHINE, "results": results}


def roofline() -> dict[str, Any]:
    peaks = {"copy": 10.0, "triad": 9.0, "float32": 100.0, "bfloat16": 900.0, "int8": 1000.0}
    parts = {"forward": 10 * 10**9, "backward": 20 * 10**9, "optimizer": 0}
    work = {
        name: {"operations": count, "pass_bytes": 10**9 if name == "forward" else 0}
        for name, count in parts.items()
    }
    return {"machine": MACHINE, "peaks": peaks, "work": {"encoder": work}}


def hooks() -> dict[str, Any]:
    costs = {"ms": {"10": 3.0, "100": 40.0}, "exponent": 1.1, "last_exponent": 1.1}
    return {
        "machine": MACHINE,
        "hooks": {"0": {"median": 17.0, "low": 16.0, "high": 18.0, "cpu": 16.5}},
        "checkpoint": {"idle_us": 1.0, "save_ms": 300.0, "megabytes": 100.0, "ratio": 1.5},
        "steps": {"overhead_us": {"1000": 400.0}, "growth": 0.001},
        "layers": {"convert": costs},
    }

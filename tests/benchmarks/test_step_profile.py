"""Every event is counted once, in its own part."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import step_profile
from compression_manager.quantization.integer.selection import TORCH
from measuring.kernel_parts import marked


def _event(name: str, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, cpu_parent=parent)


@pytest.mark.parametrize(
    ("event", "part"),
    [
        (_event("aten::mm", _event("IntegerLinearBackward")), "products"),
        (_event("onednn::qlinear_pointwise.tensor"), "products"),
        (_event("aten::_scaled_dot_product_flash_attention_for_cpu"), "products"),
        (_event("passes::multiply_integers"), "products"),
        (_event("aten::copy_", _event("passes::multiply_integers")), "products"),
        (_event("passes::convolve_integers"), "products"),
        (_event("passes::quantize"), "quantization"),
        (_event("aten::mul", _event("aten::to", _event("passes::dequantize"))), "quantization"),
        (_event("aten::aminmax"), "quantization"),
        (_event("aten::add_"), "other operators"),
        (_event("IntegerLinearBackward"), None),
        (_event("autograd::engine::evaluate_function: AddmmBackward0"), None),
    ],
)
def test_parts(event: Any, part: str | None) -> None:
    assert step_profile.part_of(event) == part


def test_passes_are_seen_and_left_as_they_were() -> None:
    before = type(TORCH).quantize
    with marked(TORCH), torch.profiler.profile() as recorded:
        TORCH.quantize(torch.randn(4, 8), 2.0, 3, 0, 255, below=True, above=True)
    names = {event.name for event in recorded.events()}
    assert "passes::quantize" in names
    assert type(TORCH).quantize is before


@pytest.mark.slow
def test_the_parts_make_the_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, path = torch.get_num_threads(), tmp_path / "profile.json"
    arguments = ["--models", "encoder", "--shrink", "16", "--steps", "2", "--threads", "1"]
    try:
        step_profile.main([*arguments, "--json", str(path)])
    finally:
        torch.set_num_threads(before)
    results = json.loads(path.read_text())["results"]
    found = {item["variant"]: item["parts"] for item in results}
    assert {"float32", "fake", "auto-torch"} <= set(found)
    for parts in found.values():
        assert sum(parts[name] for name in step_profile.PARTS) == pytest.approx(parts["all"])
        assert all(value >= 0 for value in parts.values())
    assert found["float32"]["quantization"] == 0
    assert found["auto-torch"]["quantization"] > 0
    assert "other operators" in capsys.readouterr().out

"""The benchmark runs and its checks hold; times prove nothing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from compression_manager.quantization.integer.native import load_library


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    path = Path(__file__).with_name("native_passes.py")
    specification = importlib.util.spec_from_file_location("native_passes", path)
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "native_passes", module)
    specification.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_check_passes_and_every_pass_is_timed(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    if load_library().functions is None:
        # Nothing can be timed without a compiler, or where the user switched the kernels off.
        pytest.skip(load_library().reason)
    threads = torch.get_num_threads()
    try:
        assert script.main(["--threads", "1", "--repeats", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    output = capsys.readouterr().out
    assert "PASS multiply_transposed (70, 2600, 65) torch.int8 3 pieces" in output
    assert "FAIL" not in output
    assert "quantize_rows (2048, 512)" in output

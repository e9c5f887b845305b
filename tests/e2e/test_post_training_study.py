"""The tables of post-training quantization: every way runs on a student and appears in them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_every_way_runs_and_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    study = importlib.import_module("post_training_study")
    with pytest.raises(SystemExit, match="make demo SEEDS=3"):
        study.main(["--demo", str(tmp_path)])
    folder = tmp_path / "seed-0" / "student"
    folder.mkdir(parents=True)
    save_file(study.models.student().state_dict(), folder / "model.safetensors")
    study.main(["--demo", str(tmp_path), "--output", str(tmp_path / "tables")])
    (run,) = json.loads((tmp_path / "tables" / "summary.json").read_text())
    shown = capsys.readouterr().out
    for name in (*study.MODES, *study.CORRECTED, *map(str, study.SCHEMES)):
        assert f"| {name} |" in shown
    assert run["kilobytes"]["int4 symmetric per tensor"] < run["float32 kilobytes"] / 6
    assert all(0 <= value <= 1 for value in run["modes"].values())

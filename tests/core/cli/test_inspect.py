"""`compression-manager inspect`: what a checkpoint holds, and whether it is sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import toys
from compression_manager import prepare_compression
from compression_manager.cli import main
from compression_manager.state import write_checkpoint
from compression_plugins import CheckpointConfig, QATConfig

EPOCHS = 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory: Any) -> Path:
    """A folder with the checkpoints of epochs 0, 1 and 2; epoch 1 is the best."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    torch.manual_seed(0)
    model = toys.mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = CheckpointConfig(folder, metric="accuracy", keep_last=EPOCHS)
    batches = toys.loader(toys.vectors(16))
    with prepare_compression(model, [QATConfig(), config], seed=5) as manager:
        manager.track(optimizer=optimizer)
        for epoch in manager.epochs(EPOCHS):
            for _, (inputs, targets) in manager.steps(batches):
                output = model(inputs)
                loss = torch.nn.functional.cross_entropy(output, targets)
                manager.on_after_compute_loss(inputs, output, loss).backward()
                manager.on_before_optimizer_step()
                optimizer.step()
                manager.on_after_optimizer_step()
                optimizer.zero_grad()
            manager.on_before_eval()
            gap = float("nan") if epoch == 0 else 0.25
            manager.on_after_eval({"accuracy": [0.5, 0.75, 0.625][epoch], "gap": gap})
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


def _inspected(capsys: Any, path: Path, code: int = 0) -> tuple[list[dict[str, Any]], str]:
    assert main(["inspect", str(path), "--json"]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out)["checkpoints"], printed.err


def test_one_checkpoint(folder: Path, capsys: Any) -> None:
    path = folder / "step-00000004"
    (found,), errors = _inspected(capsys, path)
    assert errors == ""
    assert found["directory"] == str(path)
    assert found["verified"] is True
    assert (found["epoch"], found["step"], found["global_step"]) == (2, 0, 4)
    assert found["evaluations"] == [
        {"epoch": 0, "global_step": 2, "metrics": {"accuracy": 0.5, "gap": "nan"}},
        {"epoch": 1, "global_step": 4, "metrics": {"accuracy": 0.75, "gap": 0.25}},
    ]
    assert found["files"] == {
        item.name: item.stat().st_size for item in path.iterdir() if item.name != "manifest.json"
    }
    assert list(found["plugin_states"]) == ["qat", "checkpoint", "calibration"]
    assert "last_saved_step" in found["plugin_states"]["checkpoint"]
    assert found["tracked"] == ["optimizer"]
    assert found["recipe"]["seed"] == 5
    assert found["recipe"]["plugins"]["qat"]["weight"]["bits"] == 8


def test_number_of_tensors_is_that_of_the_file(folder: Path, capsys: Any) -> None:
    path = folder / "step-00000004"
    header = (path / "tensors.safetensors").read_bytes()
    length = int.from_bytes(header[:8], "little")
    names = set(json.loads(header[8 : 8 + length])) - {"__metadata__"}
    assert _inspected(capsys, path)[0][0]["tensors"] == len(names) > 4


def test_folder_of_several_in_order_with_the_best(folder: Path, capsys: Any) -> None:
    (folder / "notes").mkdir()
    found, errors = _inspected(capsys, folder)
    assert errors == ""
    assert [item["global_step"] for item in found] == [2, 4, 6]
    assert [item["best"] for item in found] == [False, True, False]


def test_text_is_the_same_as_yaml(folder: Path, capsys: Any) -> None:
    found, _ = _inspected(capsys, folder)
    assert main(["inspect", str(folder)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"checkpoints": found}


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
def test_flipped_bit_exits_with_1_and_names_the_file(folder: Path, capsys: Any, name: str) -> None:
    path = folder / "step-00000004" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert main(["inspect", str(path.parent)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert str(path) in printed.err
    found, errors = _inspected(capsys, folder, code=1)
    assert str(path) in errors
    assert [item.get("global_step") for item in found] == [2, 6, None]
    assert found[-1]["directory"] == str(path.parent)
    assert str(path) in found[-1]["error"]


def test_missing_newest_checkpoint_exits_with_1(folder: Path, capsys: Any) -> None:
    shutil.rmtree(folder / "step-00000006")
    found, errors = _inspected(capsys, folder, code=1)
    assert [item["global_step"] for item in found] == [2, 4]
    assert "step-00000006 is the newest checkpoint" in errors


def test_folder_of_a_run_names_where_its_checkpoints_are(folder: Path, capsys: Any) -> None:
    assert main(["inspect", str(folder.parent)]) == 1
    assert f"holds no checkpoint, but there are some in {folder}." in capsys.readouterr().err


def test_foreign_folders_and_files_exit_with_1(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "something else"}')
    for name, reason in [
        ("empty", "holds no checkpoint"),
        ("file", "not a directory"),
        ("none", "does not exist"),
        ("other", "foreign"),
    ]:
        assert main(["inspect", str(tmp_path / name)]) == 1
        printed = capsys.readouterr()
        assert printed.out == ""
        assert str(tmp_path / name) in printed.err
        assert reason in printed.err


def test_checkpoint_of_something_else_exits_with_1(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path / "own", {"weights": torch.zeros(2)}, {"global_step": 1})
    assert main(["inspect", str(tmp_path / "own")]) == 1
    assert "no training state" in capsys.readouterr().err


def test_nothing_is_changed(folder: Path, capsys: Any) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
    _inspected(capsys, folder)
    assert {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))} == before

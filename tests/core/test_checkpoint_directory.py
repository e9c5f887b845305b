"""`resume` and `load_weights` read a directory and change nothing if it does not fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from compression_manager import (
    CheckpointError,
    CheckpointMismatchError,
    ForeignDirectoryError,
    LifecycleError,
    Position,
    prepare_compression,
)
from compression_manager.state import write_checkpoint
from compression_manager.state.files import temporary_path
from probes import begin_step, call_loss, finish, probe


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    manager = begin_step(prepare_compression(toys.mlp(), [probe()]))
    call_loss(manager)
    manager.on_before_optimizer_step()
    finish(manager)
    write_checkpoint(tmp_path / "checkpoint", manager.state_dict(), metadata={})
    return tmp_path / "checkpoint"


def test_resume_returns_where_to_continue(directory: Path) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    assert manager.resume(directory) == Position(epoch=1, step=0, global_step=1)
    assert manager.resume(str(directory)) == manager.position


def test_missing_directory(tmp_path: Path) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    (tmp_path / "empty").mkdir()
    for name in ("nowhere", "empty"):
        assert manager.resume(tmp_path / name, missing_ok=True) == Position()
        with pytest.raises(CheckpointError, match="missing_ok=True"):
            manager.resume(tmp_path / name)
    with pytest.raises(ForeignDirectoryError, match=r"nowhere is not a .* it does not exist"):
        manager.resume(tmp_path / "nowhere")
    (tmp_path / "empty" / "foreign.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError) as error:
        manager.resume(tmp_path / "empty", missing_ok=True)
    assert "missing_ok" not in str(error.value)


def test_a_first_save_that_was_killed_left_nothing_to_continue(tmp_path: Path) -> None:
    temporary_path(tmp_path / "step-00000001").mkdir()
    manager = prepare_compression(toys.mlp(), [probe()])
    assert manager.resume(tmp_path, missing_ok=True) == Position()
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; it holds \.step-00000001"):
        manager.resume(tmp_path)


def test_resume_comes_before_training(directory: Path) -> None:
    manager = prepare_compression(toys.mlp(), [probe()])
    manager.on_train_begin()
    with pytest.raises(LifecycleError, match="resume must be called before on_train_begin"):
        manager.resume(directory)


def test_load_weights_takes_the_model_only(directory: Path) -> None:
    source = prepare_compression(toys.mlp(), [probe()])
    source.resume(directory)
    manager = prepare_compression(toys.mlp(), [probe("other")])
    manager.load_weights(directory)
    assert manager.position == Position()
    for name, value in source.model.state_dict().items():
        assert torch.equal(value, manager.model.state_dict()[name])


@pytest.mark.parametrize("content", ["other model", "no training state"])
def test_load_weights_that_do_not_fit(directory: Path, tmp_path: Path, content: str) -> None:
    model: Any = toys.mlp(hidden=5)
    path, error, text = (
        directory,
        CheckpointMismatchError,
        r"'0.weight' is float32 of shape \(8, 6\)",
    )
    if content == "no training state":
        path, error, text = tmp_path / "foreign", CheckpointError, "no training state"
        write_checkpoint(path, {"weights": torch.ones(1)}, metadata={})
    before = copy.deepcopy(model.state_dict())
    manager = prepare_compression(model, [probe()])
    with pytest.raises(error, match=text):
        manager.load_weights(path)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

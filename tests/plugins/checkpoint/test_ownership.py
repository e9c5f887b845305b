"""Two trainings at once never save to one folder; a dead one and a reader keep nobody out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import toys
from compression_manager import CheckpointError, CompressionManager, Position, prepare_compression
from compression_manager.state import find_checkpoint
from compression_plugins import CheckpointConfig, QATConfig
from probes import probe, run_step

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders have no locks there")

# Trains until it is killed, with a worker that outlives it.
DRIVER = """
import os, sys, time
import toys
from compression_manager import prepare_compression
from compression_plugins import CheckpointConfig, QATConfig
manager = prepare_compression(toys.mlp(), [QATConfig(), CheckpointConfig(sys.argv[1])])
manager.on_train_begin()
worker = os.fork()
if worker == 0:
    sys.stdin.read()
    os._exit(0)
print("begun", flush=True)
time.sleep(600)
"""


def _manager(folder: Path) -> CompressionManager:
    manager = prepare_compression(toys.mlp(), [QATConfig(), CheckpointConfig(folder)])
    manager.resume(folder, missing_ok=True)
    return manager


def _epoch(manager: CompressionManager) -> None:
    manager.on_epoch_begin(manager.position.epoch)
    run_step(manager, 0)
    manager.on_epoch_end()


def test_a_second_training_is_refused_before_it_does_anything(tmp_path: Path) -> None:
    first, second = _manager(tmp_path), _manager(tmp_path)
    first.on_train_begin()
    with pytest.raises(CheckpointError, match=r"another training saves to .* every rank, a folder"):
        second.on_train_begin()
    _epoch(first)
    assert second.resume(tmp_path).epoch == 1  # reading is free
    with pytest.raises(CheckpointError, match="end the other one first"):
        second.on_train_begin()
    first.on_train_end()
    second.on_train_begin()
    _epoch(second)
    second.close()
    third = _manager(tmp_path)
    assert third.position == Position(2, 0, 2)
    third.on_train_begin()
    third.close()


def test_a_training_that_another_plugin_refused_to_begin_begins_later(tmp_path: Path) -> None:
    refusals = [CheckpointError("not yet")]

    def on_train_begin(self: object) -> None:
        if refusals:
            raise refusals.pop()

    plugins = [CheckpointConfig(tmp_path), probe(on_train_begin=on_train_begin)]
    with prepare_compression(toys.mlp(), plugins) as manager:
        with pytest.raises(CheckpointError, match="not yet"):
            manager.on_train_begin()
        manager.on_train_begin()
        _epoch(manager)
    assert find_checkpoint(tmp_path).name == "step-00000001"


def test_checkpoints_of_another_training_do_not_keep_the_folder_held(tmp_path: Path) -> None:
    with _manager(tmp_path) as manager:
        manager.on_train_begin()
        _epoch(manager)
    stranger = prepare_compression(toys.mlp(), [QATConfig(), CheckpointConfig(tmp_path)])
    with pytest.raises(CheckpointError, match="already holds checkpoints of another training"):
        stranger.on_train_begin()
    with _manager(tmp_path) as manager:
        manager.on_train_begin()


def test_a_killed_training_keeps_nobody_out(tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            manager = _manager(tmp_path)
            with pytest.raises(CheckpointError, match="in another process"):
                manager.on_train_begin()
        finally:
            process.kill()
        process.wait()
        manager.on_train_begin()
        manager.close()


def test_a_manager_that_was_dropped_keeps_nobody_out(tmp_path: Path) -> None:
    """As when the cell of a notebook is run again."""
    manager = _manager(tmp_path)
    manager.on_train_begin()
    _epoch(manager)
    manager = _manager(tmp_path)
    manager.on_train_begin()
    manager.close()

"""A training on the device resumes to the last bit, dropout included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import toys
from compression_manager import CompressionManager, prepare_compression
from compression_manager.state import write_checkpoint
from compression_manager.testing import differences
from compression_plugins import LearnedScaleConfig, QATConfig

EPOCHS = 2


class StoppedError(Exception):
    """Ends a run in the middle."""


class Moving:
    """Batches of a loader, moved to the device."""

    def __init__(self, device: torch.device) -> None:
        self._loader = toys.loader(toys.images(), shuffle=True)
        self._device = device

    def __iter__(self) -> Any:
        for inputs, targets in self._loader:
            yield inputs.to(self._device), targets.to(self._device)

    def __len__(self) -> int:
        return len(self._loader)


def start(device: torch.device, seed: int, learned: bool) -> tuple[CompressionManager, Any]:
    torch.manual_seed(seed)
    model = toys.ConvNet(dropout=0.5).to(device)
    configs = [QATConfig(), *([LearnedScaleConfig()] if learned else [])]
    manager = prepare_compression(model, configs)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    return manager, optimizer


@pytest.mark.parametrize("learned", [False, True], ids=["observed", "learned"])
@pytest.mark.parametrize("at", [(0, 1), (1, 2)], ids=str)
def test_resumed_runs_end_with_the_same_bits(at, learned, device, deterministic, tmp_path):
    manager, optimizer = start(device, 0, learned)
    expected = toys.train(manager, Moving(device), optimizer, EPOCHS)
    final = manager.state_dict()

    directory: Path = tmp_path / "checkpoint"
    stopped, optimizer = start(device, 0, learned)

    def save(epoch: int, step: int, loss: Any) -> None:
        if (epoch, step) == at:
            write_checkpoint(directory, stopped.state_dict(), metadata={})
            raise StoppedError

    with pytest.raises(StoppedError):
        toys.train(stopped, Moving(device), optimizer, EPOCHS, after_step=save)

    resumed, optimizer = start(device, 99, learned)
    resumed.resume(directory)
    torch.rand(7, device=device)  # whatever is drawn before training must not matter
    losses = toys.train(resumed, Moving(device), optimizer, EPOCHS)
    assert losses == expected[-len(losses) :]
    assert 0 < len(losses) < len(expected)
    assert differences(resumed.state_dict()["model"], final["model"]) == []
    assert differences(resumed.state_dict()["tracked"], final["tracked"]) == []
    assert differences(resumed.state_dict()["random"], final["random"]) == []

"""Each built-in plugin works without the others, and leaves no trace when the manager closes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.model_call import tensors_in
from compression_plugins import (
    CalibrationConfig,
    CheckpointConfig,
    DistillationConfig,
    EarlyStoppingConfig,
    ProgressConfig,
    PTQConfig,
    QATConfig,
    TensorBoardConfig,
)

PLUGINS: dict[str, Callable[[Path], Any]] = {
    "distillation": lambda path: DistillationConfig(toys.ConvNet(8)),
    "qat": lambda path: QATConfig(),
    "ptq": lambda path: PTQConfig(
        calibration_data=toys.loader(toys.images()), bias_correction=True
    ),
    "calibration": lambda path: CalibrationConfig(),
    "checkpoint": lambda path: CheckpointConfig(path / "checkpoints"),
    "tensorboard": lambda path: TensorBoardConfig(path / "tensorboard"),
    "progress": lambda path: ProgressConfig(),
    "early_stopping": lambda path: EarlyStoppingConfig(metric="loss", lower_is_better=True),
}


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", PLUGINS)
def test_alone(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = toys.ConvNet()
    classes = [type(module) for module in model.modules()]
    keys = list(model.state_dict())
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    manager = prepare_compression(model, [PLUGINS[name](tmp_path)])
    manager.track(optimizer=optimizer)
    losses = toys.train(manager, toys.loader(toys.images()), optimizer, epochs=2)
    assert len(losses) == 8
    # Tensors are buffers of the model's layers, where moving and casting the model finds them.
    assert list(tensors_in(manager.state_dict()["plugins"])) == []
    if name in ("qat", "ptq"):
        assert manager.convert()(torch.randn(2, 1, 8, 8)).shape == (2, 4)
    else:
        with pytest.raises(ConfigError, match="nothing was converted"):
            manager.convert()
    manager.close()
    assert [type(module) for module in model.modules()] == classes
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert _hooks(model) == 0

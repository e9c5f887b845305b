"""A moving average of the model that was copied before training follows its phases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from compression_manager import PluginConfig, prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import LearnedScaleConfig, QATConfig
from quantization_reference import step

FOUR_BITS = QuantizationScheme(4, granularity="channel")
CONFIGS: dict[str, list[PluginConfig]] = {
    "auto": [QATConfig(weight=FOUR_BITS)],
    "fake": [QATConfig(weight=FOUR_BITS, forward="fake")],
    "dynamic": [QATConfig(weight=FOUR_BITS, activation=QuantizationScheme(dynamic=True))],
    "learned scales": [QATConfig(weight=FOUR_BITS), LearnedScaleConfig()],
}


def updated_by_torch(model: nn.Module) -> tuple[nn.Module, Any]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    return average, lambda: average.update_parameters(model)


def updated_by_hand(model: nn.Module) -> tuple[nn.Module, Any]:
    """As timm does: in eval mode from the start, all of the state written over."""
    average = AveragedModel(model).eval()

    @torch.no_grad()
    def update() -> None:
        for name, value in model.state_dict().items():
            average.module.state_dict()[name].copy_(value)

    return average, update


@pytest.mark.parametrize("kind", [updated_by_torch, updated_by_hand])
@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_an_average_that_forgets_at_once_computes_what_the_model_does(
    configs: list[PluginConfig], kind: Any
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
    manager = prepare_compression(model, configs)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    average, update = kind(model)
    inputs = torch.randn(32, 16)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(3):
        step(manager, inputs, index, optimizer)
        update()
    model.eval()
    average.eval()
    with torch.no_grad():
        assert torch.equal(average(inputs), model(inputs))
    manager.close()

"""A moving average of the model that was copied before training follows its phases."""

from __future__ import annotations

import copy
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


def test_a_frozen_average_stays_frozen() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 4))
    manager = prepare_compression(model, [QATConfig(), LearnedScaleConfig()])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    average = copy.deepcopy(model).requires_grad_(False)
    inputs = torch.randn(8, 16)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(3):
        step(manager, inputs, index, optimizer)
        for name, value in model.state_dict().items():
            average.state_dict()[name].copy_(value)
        average(inputs)
        assert not any(parameter.requires_grad for parameter in average.parameters())
    manager.close()


@pytest.mark.parametrize("writes", range(4))
def test_a_copy_is_read_anew_however_often_its_buffers_were_written(writes: int) -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    manager = prepare_compression(model, [QATConfig()])
    (weight_quantizer, _) = model[0].quantizers()
    for _ in range(writes):
        weight_quantizer.set_phase(observing=True, quantizing=False)
    twin = copy.deepcopy(model)[0].quantizers()[0]
    for _ in range(4):
        twin.quantizing.logical_not_()
        assert twin.phase.quantizing == bool(twin.quantizing)
    manager.close()


def test_transforms_over_stacked_models_take_the_phase_as_it_is() -> None:
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(16, 4)) for _ in range(2)]
    inputs, managers = torch.randn(8, 16), []
    for model in models:
        managers.append(prepare_compression(model, [QATConfig()]))
        managers[-1].on_train_begin()
        managers[-1].on_epoch_begin(0)
        for index in range(2):
            step(managers[-1], inputs, index)
        model.eval()
    parameters, buffers = torch.func.stack_module_state(models)

    def call(parameters: Any, buffers: Any) -> Any:
        return torch.func.functional_call(models[0], (parameters, buffers), (inputs,))

    with torch.no_grad():
        outputs = torch.vmap(call)(parameters, buffers)
        for output, model in zip(outputs, models, strict=True):
            torch.testing.assert_close(output, model(inputs))
    for manager in managers:
        manager.close()

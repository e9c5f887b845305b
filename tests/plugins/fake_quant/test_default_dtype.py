"""Ranges and scales are float32, whatever torch makes tensors of by default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from compression_manager import PluginConfig, prepare_compression
from compression_manager.quantization import FakeQuantizer, HistogramCalibration
from compression_plugins import CalibrationConfig, LearnedScaleConfig, QATConfig
from quantization_reference import step

CONFIGS: dict[str, list[PluginConfig]] = {
    **{
        name: [QATConfig(), CalibrationConfig(observer=name)]
        for name in ("min_max", "moving_average", "percentile", "histogram")
    },
    "KL divergence": [
        QATConfig(),
        CalibrationConfig(observer=HistogramCalibration(objective="kl_divergence")),
    ],
    "fake": [QATConfig(forward="fake")],
    "learned scales": [QATConfig(), LearnedScaleConfig()],
}


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64], ids=str)
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
def test_scales_and_ranges_are_float32(
    configs: list[PluginConfig], default_dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).float()
    inputs = torch.randn(32, 8, dtype=torch.float32)
    manager = prepare_compression(model, configs)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    manager.track(optimizer=optimizer)
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    for index in range(3):
        step(manager, inputs, index, optimizer)
    tensors = [
        value
        for module in model.modules()
        if isinstance(module, FakeQuantizer)
        for value in module.state_dict().values()
    ]
    assert {value.dtype for value in tensors if value.is_floating_point()} == {torch.float32}
    converted = manager.convert(inputs).state_dict().values()
    assert {value.dtype for value in converted if value.is_floating_point()} == {torch.float32}
    parity = manager.report().parity
    assert parity is not None
    assert parity.output_error < 1e-6
    manager.close()

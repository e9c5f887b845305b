"""What a checkpoint's manifest says about its run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_manager.run_report.record import describe_run
from compression_manager.state import list_checkpoints
from compression_manager.training.schedule import StartAt
from compression_plugins import (
    CheckpointConfig,
    LearnedScaleConfig,
    ProgressConfig,
    PTQConfig,
    QATConfig,
)

DYNAMIC = QuantizationScheme(dynamic=True)


def _context(manager: Any) -> Any:
    return manager._context


def _trained(model: nn.Module, configs: list[Any], dataset: Any, epochs: int = 1) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    manager = prepare_compression(model, configs)
    manager.track(optimizer=optimizer)
    toys.train(manager, toys.loader(dataset), optimizer, epochs)
    return manager


def _recorded(folder: Path) -> dict[str, Any]:
    return dict(list_checkpoints(folder)[-1].metadata["run"])


def test_layers_are_those_of_the_report(tmp_path: Path) -> None:
    model = toys.ConvNet()
    manager = _trained(model, [QATConfig(), CheckpointConfig(tmp_path)], toys.images())
    layers = _recorded(tmp_path)["layers"]
    expected = manager.report().to_dict()["layers"]
    assert [layer["name"] for layer in layers] == ["conv1", "bn1", "conv2", "bn2", "fc"]
    for layer, other in zip(layers, expected, strict=True):
        del layer["quantizers"], other["sqnr_db"]
        for described in (layer, other):  # the report calls the model once more, in eval mode
            del described["arithmetic"], described["time_ratio"]
        assert layer == other


def test_numbers_of_a_weight_are_those_of_numpy(tmp_path: Path) -> None:
    model = toys.mlp()
    _trained(model, [QATConfig(), CheckpointConfig(tmp_path)], toys.vectors())
    weight = model[0].weight.detach().numpy().astype(np.float64)
    scale = np.abs(weight).max(1) / 127
    noise = weight - np.clip(np.round(weight / scale[:, None]), -127, 127) * scale[:, None]
    (found,) = (
        item for item in _recorded(tmp_path)["layers"][0]["quantizers"] if item["role"] == "weight"
    )
    assert found["shape"] == [8, 6]
    assert found["bits"] == 8
    assert found["scale"] == pytest.approx([scale.min(), scale.max()], rel=1e-6)
    assert found["zero_point"] == [0, 0]
    assert found["range"] == pytest.approx([-127 * scale.max(), 127 * scale.max()], rel=1e-6)
    sqnr = 10 * math.log10((weight**2).sum() / (noise**2).sum())
    assert found["sqnr_db"] == pytest.approx(sqnr, abs=1e-3)


def test_numbers_of_an_input_are_its_quantizers(tmp_path: Path) -> None:
    model = toys.mlp()
    _trained(model, [QATConfig(), CheckpointConfig(tmp_path)], toys.vectors())
    quantizer = model[2].input_quantizer
    (found,) = (
        item for item in _recorded(tmp_path)["layers"][1]["quantizers"] if item["role"] == "input"
    )
    scale, zero_point = float(quantizer.scale), int(quantizer.zero_point)
    assert found["scale"] == [scale, scale]
    assert found["zero_point"] == [zero_point, zero_point]
    assert found["range"] == pytest.approx([-zero_point * scale, (255 - zero_point) * scale])
    assert found["sqnr_db"] is None


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (QATConfig(fake_quantize_at=StartAt(step=1000)), "fake quantization has not begun"),
        (
            QATConfig(activation=QuantizationScheme(dynamic=True)),
            "every input brings its own range",
        ),
    ],
    ids=["late", "dynamic"],
)
def test_unknown_range_says_why(tmp_path: Path, config: QATConfig, problem: str) -> None:
    _trained(toys.mlp(), [config, CheckpointConfig(tmp_path)], toys.vectors())
    for layer in _recorded(tmp_path)["layers"]:
        found = {item["role"]: item for item in layer["quantizers"]}
        assert found["input"]["problem"] == problem
        assert found["input"]["range"] is None
        assert found["weight"]["problem"] is None


def test_weight_that_is_not_finite_is_recorded_as_a_problem() -> None:
    model = toys.mlp()
    with prepare_compression(model, [QATConfig()]) as manager:
        with torch.no_grad():
            model[0].weight[0, 0] = math.inf
        record = describe_run(_context(manager))
    found = record["layers"][0]["quantizers"][0]
    assert "to inf in channel 0" in found["problem"]
    assert found["scale"] is None
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize("fake_quantize_at", [0, 1000])
def test_describing_changes_nothing(fake_quantize_at: int) -> None:
    config = QATConfig(fake_quantize_at=StartAt(step=fake_quantize_at))
    manager = _trained(toys.ConvNet(), [config], toys.images())
    before = {name: value.clone() for name, value in manager.model.state_dict().items()}
    random = torch.get_rng_state()
    describe_run(_context(manager))
    toys.assert_identical(dict(manager.model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    "configs",
    [
        [ProgressConfig()],
        [QATConfig(), LearnedScaleConfig()],
        [PTQConfig(calibration_data=[toys.vectors().tensors[0]])],
    ],
    ids=["nothing quantized", "learned scales", "post-training"],
)
def test_every_kind_of_run_is_described(configs: list[Any], tmp_path: Path) -> None:
    with prepare_compression(toys.mlp(), configs) as manager:
        record = describe_run(_context(manager))
    assert [layer["name"] for layer in record["layers"]] == ["0", "2"]
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_environment_is_this_one(tmp_path: Path) -> None:
    _trained(toys.mlp(), [CheckpointConfig(tmp_path)], toys.vectors())
    environment = _recorded(tmp_path)["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert environment["devices"] == ["cpu"]
    assert environment["processes"] == 1


def test_notes_are_those_of_the_plugins() -> None:
    with prepare_compression(toys.mlp(), [ProgressConfig()]) as manager:
        _context(manager).note("someone", "something to say")
        assert describe_run(_context(manager))["notes"] == {"someone": "something to say"}

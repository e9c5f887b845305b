"""Post-training quantization: conversion, saving, recipes and restarts."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import toys
from compression_manager import ConfigError, deploy, prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_plugins import LayerRule, PTQConfig
from quantization_reference import activation_grid

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]
BATCHES = list(VECTORS.split(8))


def quantized(model, *others, **options):
    """A manager after PTQ; static on VECTORS unless `mode` says otherwise."""
    if options.get("mode", "static") == "static":
        options.setdefault("calibration_data", BATCHES)
    return prepare_compression(model, [PTQConfig(**options), *others])


def network(kind=toys.mlp):
    torch.manual_seed(0)
    return kind()


def grid_of(layer):
    parameters = layer.input_quantizer.quantization_parameters()
    return float(parameters.scale), float(parameters.zero_point)


class Everything(nn.Module):
    """An embedding, attention, a foldable convolution, and a head; input (N, 5) of 0 to 8."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.conv = nn.Conv1d(6, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, indices):
        hidden = self.embedding(indices)
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        return self.head(self.bn(self.conv(hidden.transpose(1, 2))).relu().mean(-1))


INDICES = torch.randint(9, (16, 5), generator=torch.Generator().manual_seed(0))
TOKEN = QuantizationScheme(granularity="token", dynamic=True)
FOUR_BITS = QuantizationScheme(bits=4, granularity="group", group_size=4)
MODES = {
    "static": {},
    "static 4-bit groups": {"weight": FOUR_BITS},
    "static with a dynamic head": {"overrides": (LayerRule("head", activation=TOKEN),)},
    "static, corrected": {"bias_correction": True},
    "dynamic": {"mode": "dynamic"},
    "dynamic per token": {"mode": "dynamic", "activation": TOKEN},
    "weight-only": {"mode": "weight_only"},
}


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("seed", [0, 1])
def test_conversion_is_exact_and_survives_saving(options, seed, tmp_path):
    torch.manual_seed(seed)
    model = Everything()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.5, 2)
    needs_data = options.get("mode", "static") == "static"
    data = {"calibration_data": [INDICES[:8], INDICES[8:]]} if needs_data else {}
    manager = prepare_compression(model, [PTQConfig(**data, **options)])
    converted = manager.convert(None if needs_data else INDICES)
    parity = manager.report().parity
    assert parity.layer_errors.keys() >= {"embedding", "attention", "conv", "head"}
    assert max(parity.layer_errors.values()) <= 1e-6
    assert "int8" in str(converted.head.integer_weight().dtype)
    output = converted(INDICES)
    torch.testing.assert_close(output, model.eval()(INDICES), rtol=1e-4, atol=1e-4)
    manager.save_converted(tmp_path / "model")
    loaded = deploy.load(tmp_path / "model", Everything())
    assert torch.equal(loaded(INDICES), output)


def test_batch_norm_is_folded_without_example_inputs():
    model = network(toys.ConvNet)
    manager = quantized(model, calibration_data=IMAGES.split(8))
    converted = manager.convert()
    assert isinstance(converted.bn1, nn.Identity)
    assert isinstance(converted.bn2, nn.Identity)
    assert "folded into 'conv1'" in str(manager.report())


def test_two_lines_and_a_report():
    manager = prepare_compression(
        network(toys.ConvNet), [PTQConfig(calibration_data=toys.loader(toys.images()))]
    )
    int8 = manager.convert()
    assert int8(IMAGES).shape == (32, 4)
    report = manager.report()
    noise = {layer.name: layer.sqnr_db for layer in report.layers if layer.quantized}
    assert noise.keys() == {"conv1", "conv2", "fc"}
    assert min(noise.values()) > 20
    assert report.bytes_after < 0.5 * report.bytes_before


def test_without_any_input_it_still_converts():
    manager = quantized(network(), mode="weight_only")
    assert manager.convert()[0].spec.input is None
    assert manager.report().parity is None


RECIPE = """
plugins:
  ptq:
    bias_correction: true
    calibration_batches: 2
    overrides: [{layer: "2", weight: {bits: 4, granularity: channel}}]
"""


def test_a_recipe_takes_the_data_by_name(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    model = network()
    manager = prepare_compression(model, recipe, calibration_data=BATCHES)
    seen = torch.cat(BATCHES[:2]).numpy()
    assert grid_of(model[0])[0] == activation_grid(seen.min(), seen.max())[0]
    assert manager.convert()[2].spec.weight.bits == 4
    with pytest.raises(ConfigError, match="calibration_data is missing"):
        prepare_compression(network(), recipe)
    with pytest.raises(ConfigError, match=r"recipe.yaml: plugins.ptq.calibration_data: .*no batch"):
        prepare_compression(network(), recipe, calibration_data=[])
    overrides = ["plugins.ptq={mode: dynamic, bias_correction: false, calibration_batches: null}"]
    manager = prepare_compression(network(), recipe, overrides=overrides)
    assert manager.convert(VECTORS)[0].spec.input.dynamic


def test_state_comes_back_after_a_restart():
    first = quantized(network(), bias_correction=True)
    state = first.state_dict()
    model = network()
    second = quantized(
        model, calibration_data=[2 * batch for batch in BATCHES], bias_correction=True
    )
    assert grid_of(model[0]) != grid_of(first.model[0])
    second.load_state_dict(state)
    assert grid_of(model[0]) == grid_of(first.model[0])
    assert torch.equal(second.convert()(VECTORS), first.convert(VECTORS)(VECTORS))
    second.close()
    toys.assert_identical(model.state_dict(), network().state_dict())


def test_the_data_set_may_be_a_loader_of_inputs_alone():
    model = network()
    quantized(model, calibration_data=DataLoader(TensorDataset(VECTORS), batch_size=8))
    assert model[2].input_quantizer.is_calibrated()

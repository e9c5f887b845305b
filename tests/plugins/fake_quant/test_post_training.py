"""Post-training quantization: what is calibrated on what, and what is left as it was."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import toys
from compression_manager import ConfigError, prepare_compression
from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers import QuantizedLayer
from compression_plugins import CalibrationConfig, LayerRule, PTQConfig, QATConfig
from compression_plugins.learned_scale import LearnedScaleConfig
from quantization_reference import activation_grid, step

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]
BATCHES = list(VECTORS.split(8))


def quantized(model, *others, **options):
    """A manager after PTQ; static on VECTORS unless `mode` says otherwise."""
    if options.get("mode", "static") == "static":
        options.setdefault("calibration_data", BATCHES)
    return prepare_compression(model, [PTQConfig(**options), *others])


def dropping(model):
    """`model` behind a Dropout and with one at its end, in training mode."""
    return nn.Sequential(nn.Dropout(0.5), *model, nn.Dropout(0.5)).train()


def network(kind=toys.mlp):
    torch.manual_seed(0)
    return kind()


def grid_of(layer):
    parameters = layer.input_quantizer.quantization_parameters()
    return float(parameters.scale), float(parameters.zero_point)


# Ranges --------------------------------------------------------------------------------------


def test_ranges_are_those_of_the_float_model_over_all_batches():
    model = network()
    first, last = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in (model[0], model[2])
    )
    hidden = np.maximum(VECTORS.double().numpy() @ first[0].T + first[1], 0)
    quantized(model)
    assert last[0].shape == (4, 8)
    for layer, values in ((model[0], VECTORS.numpy()), (model[2], hidden)):
        scale, zero_point, *_ = activation_grid(values.min(), values.max())
        found_scale, found_zero_point = grid_of(layer)
        assert found_scale == pytest.approx(float(scale), rel=1e-6)
        assert found_zero_point == zero_point
    # The inputs of the first layer are the data itself: equal bit for bit.
    assert grid_of(model[0])[0] == activation_grid(VECTORS.numpy().min(), VECTORS.numpy().max())[0]


def test_calibration_batches_limits_the_data():
    model = network()
    quantized(model, calibration_batches=2)
    seen = torch.cat(BATCHES[:2]).numpy()
    assert grid_of(model[0])[0] == activation_grid(seen.min(), seen.max())[0]
    assert seen.min() > VECTORS.min()


def test_only_as_many_batches_are_drawn_as_asked_for():
    drawn = []

    def batches():
        for batch in BATCHES:
            drawn.append(len(drawn))
            yield batch

    quantized(network(), calibration_data=batches(), calibration_batches=2)
    assert drawn == [0, 1]


@pytest.mark.parametrize("observer", ["min_max", "moving_average", "percentile", "histogram"])
def test_a_listed_calibration_plugin_chooses_the_observer(observer):
    model = network()
    quantized(model, CalibrationConfig(observer=observer))
    kind = observer.replace("_", "")
    assert type(model[0].input_quantizer.observer).__name__.lower() == f"{kind}observer"
    assert model[0].input_quantizer.is_calibrated()


def test_moving_averages_follow_the_order_of_the_batches():
    model = network()
    quantized(model, CalibrationConfig(observer="moving_average", averaging_constant=0.5))
    low = high = None
    for batch in BATCHES:
        least, most = np.float32(batch.min()), np.float32(batch.max())
        low = least if low is None else low + np.float32(0.5) * (least - low)
        high = most if high is None else high + np.float32(0.5) * (most - high)
    assert grid_of(model[0])[0] == pytest.approx(float(activation_grid(low, high)[0]), rel=1e-6)


def test_batch_norm_and_dropout_calibrate_as_they_will_serve():
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 4))
    model[1].running_mean.fill_(5.0)
    statistics = model[1].running_mean.clone(), model[1].num_batches_tracked.clone()
    with torch.no_grad():
        hidden = model.eval()[1](model[0](VECTORS))
    model.train()
    quantized(model)
    scale, _ = grid_of(model[3])
    assert scale == pytest.approx(float(activation_grid(hidden.min(), hidden.max())[0]), rel=1e-5)
    assert torch.equal(model[1].running_mean, statistics[0])
    assert torch.equal(model[1].num_batches_tracked, statistics[1])


# What stays as it was ------------------------------------------------------------------------


def test_preparing_leaves_no_trace_but_the_quantizers():
    model = dropping(network())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    shuffled = DataLoader(toys.vectors(), batch_size=8, shuffle=True)
    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    manager = quantized(model, calibration_data=shuffled, bias_correction=False)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    manager.close()
    assert list(model.state_dict()) == list(before)
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_a_failing_batch_leaves_the_float_model():
    model = network().train()
    batches = [*BATCHES, torch.zeros(2, 5)]
    with pytest.raises(ConfigError, match="batch 4 of calibration_data") as caught:
        quantized(model, calibration_data=batches)
    assert caught.value.option == "calibration_data"
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(module.training for module in model.modules())
    quantized(model)


def test_training_on_keeps_the_ranges_and_trains_the_weights():
    model = network()
    manager = quantized(model)
    ranges = [grid_of(model[index]) for index in (0, 2)]
    weight = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()
    manager.on_train_begin()
    manager.on_epoch_begin(0)
    step(manager, 3 * VECTORS, 0, optimizer)
    assert [grid_of(model[index]) for index in (0, 2)] == ranges
    assert not torch.equal(model[0].weight, weight)
    converted = manager.convert()
    torch.testing.assert_close(converted(VECTORS), model.eval()(VECTORS), rtol=1e-5, atol=1e-6)


# Forms of a batch ----------------------------------------------------------------------------


class Named(nn.Module):
    """Takes `input` and `shift` by position or by name."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, input, shift=None):
        return self.layer(input if shift is None else input + shift)


SHIFT = torch.full((8, 6), 2.0)


@pytest.mark.parametrize(
    ("wrap", "shifted"),
    [
        (lambda batch: batch, False),
        (lambda batch: (batch, torch.zeros(8)), False),
        (lambda batch: [batch, torch.zeros(8)], False),
        (lambda batch: [batch], False),
        (lambda batch: {"input": batch, "shift": SHIFT, "labels": torch.zeros(8)}, True),
        (lambda batch: ({"input": batch, "shift": SHIFT, "label": 0}, torch.zeros(8)), True),
        (lambda batch: ((batch, SHIFT), torch.zeros(8)), True),
    ],
    ids=["tensor", "pair", "list", "single", "mapping", "mapping and target", "positions"],
)
def test_batches_reach_the_model_as_the_loop_would_pass_them(wrap, shifted):
    model = Named()
    manager = quantized(model, calibration_data=[wrap(batch) for batch in BATCHES])
    seen = VECTORS.numpy() + np.float32(2.0 if shifted else 0.0)
    assert grid_of(model.layer)[0] == activation_grid(seen.min(), seen.max())[0]
    manager.convert()
    assert manager.report().parity.layer_errors.keys() == {"layer"}


def test_other_forms_need_a_function():
    data = [(0, batch, SHIFT) for batch in BATCHES]
    with pytest.raises(ConfigError, match=r"has 3 parts.*calibration_forward"):
        quantized(Named(), calibration_data=data)
    model = Named()
    manager = quantized(
        model,
        calibration_data=data,
        calibration_forward=lambda model, batch: model(batch[1], shift=batch[2]),
    )
    seen = VECTORS.numpy() + np.float32(2)
    assert grid_of(model.layer)[0] == activation_grid(seen.min(), seen.max())[0]
    assert manager.convert()(VECTORS).shape == (32, 4)


def test_a_failing_function_is_named():
    with pytest.raises(ConfigError, match="batch 0 of calibration_data through calibration_for"):
        quantized(Named(), calibration_forward=lambda model, batch: model(no=batch))


def test_lazy_data_is_walked_once():
    quantized(network(), calibration_data=iter(BATCHES))
    quantized(network(), calibration_data=iter(BATCHES), bias_correction=True)


# Refusals ------------------------------------------------------------------------------------


def test_data_without_batches_is_refused():
    with pytest.raises(ConfigError, match="calibration_data holds no batch"):
        quantized(network(), calibration_data=[])


def test_two_owners_of_the_weights_are_refused():
    with pytest.raises(ConfigError, match="'ptq' and 'qat' both own the role 'fake_quant'"):
        quantized(network(), QATConfig())


def test_learned_scales_are_for_training():
    with pytest.raises(ConfigError, match=r"list QATConfig\(\) instead"):
        quantized(network(), LearnedScaleConfig())


def test_a_model_without_layers_is_refused():
    with pytest.raises(ConfigError, match="PTQConfig would quantize nothing"):
        quantized(nn.Sequential(nn.ReLU()), mode="dynamic")


@pytest.mark.parametrize(
    "rule",
    [
        LayerRule("*", weight_only=True),
        LayerRule("*", activation=QuantizationScheme(granularity="token", dynamic=True)),
    ],
)
def test_static_mode_needs_an_input_to_calibrate(rule):
    with pytest.raises(ConfigError, match="finds no input to calibrate") as caught:
        quantized(network(), overrides=(rule,))
    assert caught.value.option == "mode"


@pytest.mark.parametrize(
    "rules",
    [(), (LayerRule("2", activation=QuantizationScheme(granularity="token", dynamic=True)),)],
    ids=["static", "partly dynamic"],
)
def test_data_that_is_all_nan_is_refused(rules):
    data = [torch.full((2, 6), float("nan"))]
    with pytest.raises(ConfigError, match="no batch gave a range"):
        quantized(network(), calibration_data=data, overrides=rules)


def test_batches_with_nan_are_left_out_with_a_warning():
    model = network()
    spoilt = 100 * BATCHES[0]
    spoilt[0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"NaN or infinity .* '0 \(1\)', '2 \(1\)'"):
        quantized(model, calibration_data=[*BATCHES, spoilt])
    assert grid_of(model[0])[0] == activation_grid(VECTORS.numpy().min(), VECTORS.numpy().max())[0]


def test_a_layer_that_no_batch_reaches_is_warned_about_and_stays_weight_only():
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    model.forward = lambda input: model["used"](input)
    with pytest.warns(UserWarning, match="no range for the inputs of 'unused'"):
        manager = quantized(model)
    converted = manager.convert()
    assert converted["unused"].spec.input is None
    assert converted["used"].spec.input is not None

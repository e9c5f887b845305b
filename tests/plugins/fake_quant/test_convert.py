"""Conversion of trained layers: integers, folded BatchNorm, and what cannot be converted."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import toys
from compression_manager import prepare_compression
from compression_manager.deploy import ConvertedConv, ConvertedEmbedding, ConvertedLinear
from compression_manager.errors import ConfigError, QuantizationError
from compression_manager.quantization import QuantizationScheme
from compression_manager.training.schedule import StartAt
from compression_plugins.distillation import DistillationConfig
from compression_plugins.fake_quant import LayerRule, QATConfig
from compression_plugins.fake_quant.convert import convert_layer
from quantization_reference import integers, prepared, trained, weight_grid

IMAGES = toys.images().tensors[0]
VECTORS = toys.vectors().tensors[0]


def pair(*, bias=False, affine=True, gamma=(1.0, -0.5, 0.0, 2.0), seed=0):
    """A trained conv-BatchNorm pair with awkward statistics; input (N, 1, 8, 8)."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=bias), nn.BatchNorm2d(4, affine=affine))
    manager = prepared(model, [IMAGES, IMAGES])
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.1, 4.0)
        if affine:
            model[1].weight.copy_(torch.tensor(gamma))
            model[1].bias.normal_()
    return manager, model


# Down to where the folded scale is still a normal float32.
GAMMAS = st.sampled_from([0.0, -0.0, 1e-30, -1.0]) | st.floats(0.01, 3) | st.floats(-3, -0.01)


@settings(max_examples=25, deadline=None)
@given(
    bias=st.booleans(),
    affine=st.booleans(),
    gamma=st.lists(GAMMAS, min_size=4, max_size=4),
    seed=st.integers(0, 2**16),
)
def test_folding_changes_scales_and_signs_alone(bias, affine, gamma, seed):
    manager, model = pair(bias=bias, affine=affine, gamma=gamma, seed=seed)
    weight = model[0].weight.detach().numpy()
    grid = weight_grid(weight)
    expected_integers = integers(weight, grid, 0).clip(-127, 127)
    converted = manager.convert()
    conv = converted[0]
    assert isinstance(conv, ConvertedConv)
    assert isinstance(converted[1], nn.Identity)

    norm = model[1]
    factor = 1 / np.sqrt(norm.running_var.double().numpy() + norm.eps)
    if affine:
        factor = factor * np.array(gamma)
    sign = np.sign(factor).reshape(-1, 1, 1, 1)
    assert conv.integer_weight().dtype == torch.int8
    assert np.array_equal(conv.integer_weight().numpy(), expected_integers * sign)
    live = factor != 0
    scale = conv.weight_scale.double().numpy()
    np.testing.assert_allclose(scale[live], (grid[0] * np.abs(factor))[live], rtol=1e-6)
    assert (scale > 0).all()
    shift = (model[0].bias.detach().double().numpy() if bias else 0) - norm.running_mean.numpy()
    shift = shift * factor + (norm.bias.detach().numpy() if affine else 0)
    np.testing.assert_allclose(conv.bias.numpy(), shift, rtol=1e-5, atol=1e-6)

    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(converted(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(granularity="channel", narrow_range=False),
        QuantizationScheme(bits=1, granularity="channel"),
    ],
    ids=str,
)
def test_what_has_no_negative_of_every_integer_is_not_folded(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    manager = prepared(model, [IMAGES, IMAGES], weight=scheme)
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1.0]))
    assert isinstance(manager.convert()[1], nn.BatchNorm2d)


def test_a_layer_converts_to_the_integers_of_training():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 6), "head": nn.Linear(6, 3)})
    model.forward = lambda input: model["head"](model["embedding"](input))
    indices = torch.arange(9).reshape(3, 3)
    manager = prepared(model, [indices, indices])
    converted = manager.convert()
    for name, kind in (("embedding", ConvertedEmbedding), ("head", ConvertedLinear)):
        weight = model[name].weight.detach().numpy()
        grid = weight_grid(weight)
        layer = converted[name]
        assert type(layer) is kind
        expected = integers(weight, grid, 0).clip(-127, 127)
        assert np.array_equal(layer.integer_weight().numpy(), expected)
        assert np.array_equal(layer.weight_scale.numpy(), grid[0])
    head = model["head"]
    assert torch.equal(converted["head"].bias, head.bias)
    assert torch.equal(converted["head"].input_scale, head.input_quantizer.scale)
    assert torch.equal(converted["head"].input_zero_point, head.input_quantizer.zero_point)


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(bits=2, granularity="channel"),
        QuantizationScheme(bits=16),
        QuantizationScheme(bits=32, granularity="channel"),
        QuantizationScheme(bits=6, symmetric=False, granularity="channel"),
        QuantizationScheme(symmetric=False, signed=False),
        QuantizationScheme(signed=False, granularity="channel"),
        QuantizationScheme(granularity="channel", axis=1),
        QuantizationScheme(granularity="channel", axis=-2),
    ],
    ids=str,
)
@pytest.mark.parametrize("folds", [False, True])
def test_every_scheme_computes_what_training_computed(scheme, folds):
    torch.manual_seed(0)

    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(7, 6)
            self.linear = nn.Linear(6, 6)
            self.conv = nn.Conv1d(6, 4, 3, padding="same", padding_mode="circular")
            self.bn = nn.BatchNorm1d(4) if folds else nn.Identity()

        def forward(self, input):
            return self.bn(self.conv(self.linear(self.embedding(input)).transpose(1, 2)))

    indices = torch.randint(7, (4, 8))
    model = Everything()
    manager = trained(model, indices, weight=scheme)
    converted = manager.convert()
    assert all(error < 1e-6 for error in manager._conversion.parity.layer_errors.values())
    assert len(manager._conversion.parity.layer_errors) == 3
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(converted(indices), model(indices), rtol=1e-5, atol=1e-5)
    assert converted.embedding.integer_weight().dtype == scheme.storage_dtype


@pytest.mark.parametrize(
    "activation",
    [QuantizationScheme(bits=4), QuantizationScheme(bits=16, symmetric=False), None],
    ids=str,
)
def test_every_activation_scheme_computes_what_training_computed(activation):
    model = toys.mlp()
    manager = trained(model, VECTORS, activation=activation)
    converted = manager.convert()
    model.eval()
    assert torch.equal(converted(VECTORS), model(VECTORS))


def test_bfloat16_models_convert():
    torch.manual_seed(0)
    model = toys.ConvNet().bfloat16()
    images = IMAGES.bfloat16()
    manager = trained(model, images)
    converted = manager.convert()
    assert converted(images).dtype == torch.bfloat16
    assert converted.fc.integer_weight().dtype == torch.int8
    assert converted.fc.bias.dtype == torch.bfloat16
    assert converted.fc.weight_scale.dtype == torch.float32
    model.eval()
    torch.testing.assert_close(converted(images), model(images), rtol=5e-2, atol=5e-2)


def test_a_layer_that_training_never_used_is_converted_without_input_range():
    torch.manual_seed(0)
    model = nn.ModuleDict({"used": nn.Linear(6, 4), "unused": nn.Linear(6, 4)})
    model.forward = lambda input: model["used"](input)
    manager = prepared(model, [VECTORS] * 2)
    converted = manager.convert()
    layer = converted["unused"]
    assert layer.spec.input is None
    assert layer.integer_weight().dtype == torch.int8
    model.eval()
    assert torch.equal(layer(VECTORS), model["unused"](VECTORS))
    detail = {item.name: item.detail for item in manager.report().layers}["unused"]
    assert "it met no value in train mode" in detail


def test_a_backbone_that_stays_in_eval_mode_is_told():
    backbone = nn.Sequential(*(nn.Linear(6, 6) for _ in range(7)))
    model = nn.Sequential(backbone, nn.Linear(6, 4))
    manager = prepare_compression(model, [QATConfig()])
    for _ in manager.epochs(1):
        for _, batch in manager.steps([VECTORS] * 3):
            model.train()
            backbone.eval()
            manager.on_after_compute_loss(batch, None, model(batch).mean()).backward()
            manager.on_before_optimizer_step()
            manager.on_after_optimizer_step()
    with pytest.warns(
        UserWarning, match=r"'0\.0', .*'0\.4' and 2 more layers met values in eval mode"
    ):
        converted = manager.convert(VECTORS)
    assert converted[0][0].spec.input is None
    assert converted[1].spec.input is not None


def test_a_layer_that_was_replaced_or_removed_is_named():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    manager = prepared(model, [VECTORS] * 2)
    model[1] = nn.Linear(6, 3)
    with pytest.raises(QuantizationError, match=r"layer '1' is a Linear now, .*prepare it again"):
        manager.convert(VECTORS)
    del model[1]
    with pytest.raises(QuantizationError, match=r"layer '1' is gone, .*prepare it again"):
        manager.on_step_begin(2)


@pytest.mark.parametrize("steps", [0, 1])
def test_converting_before_fake_quantization_began_is_an_error(steps):
    manager = prepared(toys.mlp(), [VECTORS] * steps)
    with pytest.raises(QuantizationError, match="fake quantization has not begun") as caught:
        manager.convert(VECTORS)
    assert "StartAt(step=1" in str(caught.value)
    assert "'qat'" in str(caught.value)


def test_converting_without_any_observed_range_is_an_error():
    manager = prepared(toys.mlp(), [VECTORS] * 2, observe_at=StartAt(step=5))
    with pytest.raises(QuantizationError, match="no layer has observed the range"):
        manager.convert()


def test_weights_alone_need_no_observed_range():
    manager = prepared(toys.mlp(), [VECTORS] * 2, activation=None)
    assert manager.convert()[0].spec.input is None


def test_a_weight_that_is_not_finite_is_an_error_that_names_the_layer():
    manager = prepared(toys.mlp(), [VECTORS] * 2)
    with torch.no_grad():
        manager.model[2].weight[0, 0] = float("nan")
    with pytest.raises(QuantizationError, match="weight of layer '2'"):
        manager.convert()


def test_distillation_alone_converts_nothing():
    teacher = toys.mlp()
    manager = prepare_compression(toys.mlp(), [DistillationConfig(teacher)])
    with pytest.raises(ConfigError, match="nothing was converted"):
        manager.convert(VECTORS)


def test_skipped_layers_stay_as_they_are():
    model = toys.mlp()
    manager = trained(model, VECTORS, overrides=(LayerRule("2", skip=True),))
    converted = manager.convert()
    assert type(converted[2]) is nn.Linear
    assert torch.equal(converted[2].weight, model[2].weight)
    assert converted[2].weight is not model[2].weight


def test_converting_one_layer_takes_no_manager():
    manager = prepared(toys.mlp(), [VECTORS] * 2)
    layer = copy.deepcopy(manager.model[0]).eval()
    assert torch.equal(convert_layer(layer)(VECTORS), layer(VECTORS))
    assert QATConfig.plugin == "qat"

"""Quantization-aware layers against numpy's arithmetic and torch's float operation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression_manager.quantization import (
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.layers import (
    QUANTIZED_CLASSES,
    QuantizedLayer,
    quantize_layer,
    restore_layer,
)
from compression_plugins.calibration import MinMaxObserver
from quantization_reference import activation_grid, fake_quantized, weight_grid

WEIGHT = QuantizationScheme(granularity="channel")
ACTIVATION = QuantizationScheme(symmetric=False, signed=False)
CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}


def quantizer(role, scheme, channels=None):
    site = QuantizationSite("layer", role, channels)
    result = ObservedFakeQuantizer(scheme, site, MinMaxObserver(scheme, site))
    result.set_phase(observing=True, quantizing=True)
    return result


def quantized(layer, *, weight_only=False, scheme=WEIGHT):
    channels = None if scheme.axis is None else layer.weight.shape[scheme.axis]
    activation = None if weight_only else quantizer("activation", ACTIVATION)
    return quantize_layer(layer, quantizer("weight", scheme, channels), activation)


def reference(input, weight, bias, operation, *, weight_only=False, axis=0):
    """Output of `operation` on quantized operands, and the straight-through gradients."""
    values = [weight.detach().numpy()]
    results = [fake_quantized(values[0], weight_grid(values[0], axis), axis)]
    if not weight_only:
        x = input.detach().numpy()
        results.append(fake_quantized(x, activation_grid(x.min(), x.max())))
    leaves = [torch.from_numpy(value).requires_grad_() for value, _ in results]
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    output = operation(input if weight_only else leaves[1], leaves[0], bias)
    output.sin().sum().backward()
    gradients = [
        leaf.grad * torch.from_numpy(mask) for leaf, (_, mask) in zip(leaves, results, strict=True)
    ]
    return output.detach(), gradients, None if bias is None else bias.grad


def check(layer, input, operation, *, weight_only=False, axis=0):
    expected, gradients, bias_gradient = reference(
        input, layer.weight, getattr(layer, "bias", None), operation,
        weight_only=weight_only, axis=axis,
    )  # fmt: skip
    output = layer(input)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    output.sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, gradients[0], rtol=1e-5, atol=1e-5)
    if not weight_only:
        torch.testing.assert_close(input.grad, gradients[1], rtol=1e-5, atol=1e-5)
    if bias_gradient is not None:
        torch.testing.assert_close(layer.bias.grad, bias_gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_linear_equals_the_reference(shape, bias):
    torch.manual_seed(0)
    layer = quantized(nn.Linear(5, 4, bias=bias))
    check(layer, torch.randn(shape, requires_grad=True), F.linear)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@settings(max_examples=60, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    padding=st.sampled_from([0, 1, 2, "same", "valid"]),
    stride=st.integers(1, 2),
    dilation=st.integers(1, 2),
    kernel=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
    bias=st.booleans(),
    unbatched=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_convolutions_equal_the_reference(
    dimensions, mode, padding, stride, dilation, kernel, groups, bias, unbatched, seed
):
    if padding == "same":
        stride = 1
    torch.manual_seed(seed)
    kind, operation = CONVOLUTIONS[dimensions]
    layer = quantized(
        kind(4, 6, kernel, stride, padding, dilation, groups, bias, padding_mode=mode)
    )
    shape = [4, *[7] * dimensions] if unbatched else [2, 4, *[7] * dimensions]

    def float_operation(input, weight, bias):
        if mode == "zeros":
            return operation(input, weight, bias, stride, padding, dilation, groups)
        total = dilation * (kernel - 1)
        amounts = {"same": (total // 2, total - total // 2), "valid": (0, 0)}
        before, after = amounts.get(padding, (padding, padding))
        input = F.pad(input, [before, after] * dimensions, mode=mode)
        return operation(input, weight, bias, stride, 0, dilation, groups)

    check(layer, torch.randn(shape, requires_grad=True), float_operation)


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("by_frequency", [False, True])
def test_embedding_equals_the_reference(padding_idx, by_frequency):
    torch.manual_seed(0)
    layer = nn.Embedding(6, 3, padding_idx, scale_grad_by_freq=by_frequency)
    with torch.no_grad():
        layer.weight.normal_()
    layer = quantized(layer, weight_only=True)
    indices = torch.tensor([[0, 2, 5], [5, 5, 1]])
    check(
        layer,
        indices,
        lambda input, weight, _: F.embedding(
            input, weight, padding_idx, scale_grad_by_freq=by_frequency
        ),
        weight_only=True,
    )
    if padding_idx is not None:
        assert not layer.weight.grad[padding_idx].any()


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_the_scheme_chooses_the_weight_s_axis(axis):
    torch.manual_seed(0)
    scheme = (
        QuantizationScheme()
        if axis is None
        else QuantizationScheme(granularity="channel", axis=axis)
    )
    layer = quantized(nn.Linear(5, 4), scheme=scheme)
    check(layer, torch.randn(3, 5, requires_grad=True), F.linear, axis=axis)


def test_a_weight_only_layer_leaves_its_input_alone():
    torch.manual_seed(0)
    layer = quantized(nn.Linear(5, 4), weight_only=True)
    check(layer, torch.randn(3, 5), F.linear, weight_only=True)
    assert layer.quantizers() == [layer.weight_quantizer]


@pytest.mark.parametrize("kind", QUANTIZED_CLASSES)
def test_the_class_changes_in_place(kind):
    arguments = (6, 3) if kind in (nn.Linear, nn.Embedding) else (6, 3, 1)
    layer = kind(*arguments)
    model = nn.Sequential(nn.Identity(), layer)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(module))

    changed = quantized(layer, weight_only=kind is nn.Embedding)

    assert changed is layer is model[1]
    assert isinstance(layer, kind)
    assert isinstance(layer, QuantizedLayer)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    input = torch.randint(6, (2,)) if kind is nn.Embedding else torch.randn(2, 6, 1, 1, 1)
    dimensions = {nn.Linear: 2, nn.Conv1d: 3, nn.Conv2d: 4, nn.Conv3d: 5}.get(kind)
    if dimensions is not None:
        input = input.reshape(2, 6, *[1] * (dimensions - 2))
    model(input).square().sum().backward()
    assert seen == [layer]
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(layer.weight, before)

    restore_layer(layer)

    assert type(layer) is kind
    assert list(layer.children()) == []
    assert list(layer.state_dict()) == list(kind(*arguments).state_dict())
    expected = kind(*arguments)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(layer(input), expected(input))


def test_evaluation_uses_the_range_of_training_and_changes_no_buffer():
    torch.manual_seed(0)
    layer = quantized(nn.Linear(5, 4))
    layer(torch.rand(3, 5))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.eval()
    far = torch.full((1, 5), 100.0)
    output = layer(far)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
    inside = F.linear(
        torch.full((1, 5), float(layer.input_quantizer.scale * 255)),
        layer.quantized_weight(),
        layer.bias,
    )
    torch.testing.assert_close(output, inside)
    assert np.isfinite(output.detach().numpy()).all()

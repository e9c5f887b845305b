"""Layers whose weight has its inputs first: a channel is an output channel all the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression_manager.quantization import QuantizationScheme
from layer_reference import check, quantized, quantized_input
from toy_transformers import Conv1D

CONVOLUTIONS = {
    1: (nn.ConvTranspose1d, F.conv_transpose1d),
    2: (nn.ConvTranspose2d, F.conv_transpose2d),
    3: (nn.ConvTranspose3d, F.conv_transpose3d),
}


def per_output_channel(weight, groups):
    """Numpy's int8 weight with one scale for all values that feed one output channel."""
    values = weight.detach().numpy()
    rows, columns = values.shape[0] // groups, values.shape[1]
    result = np.empty_like(values)
    for group in range(groups):
        for column in range(columns):
            block = values[group * rows : (group + 1) * rows, column]
            scale = np.maximum(np.float32(np.abs(block).max()) / np.float32(127), 2.0**-23)
            inverse = np.float32(1) / np.float32(scale)
            code = np.clip(np.rint(block * inverse), -127, 127)
            result[group * rows : (group + 1) * rows, column] = code * np.float32(scale)
    return torch.from_numpy(result)


@settings(max_examples=50, deadline=None)
@given(
    dimensions=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 1),
    output_padding=st.integers(0, 1),
    dilation=st.integers(1, 2),
    kernel=st.integers(2, 3),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    unbatched=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_transposed_convolutions_equal_the_reference(
    dimensions, stride, padding, output_padding, dilation, kernel, groups, bias, unbatched, seed
):
    output_padding = min(output_padding, max(stride, dilation) - 1)
    torch.manual_seed(seed)
    kind, operation = CONVOLUTIONS[dimensions]
    layer = kind(4, 8, kernel, stride, padding, output_padding, groups, bias, dilation)
    input = torch.randn([4, *[3] * dimensions] if unbatched else [2, 4, *[3] * dimensions])
    weight = per_output_channel(layer.weight, groups).requires_grad_()
    values, passes = quantized_input(input)
    values.requires_grad_()
    expected = operation(
        values, weight, layer.bias, stride, padding, output_padding, groups, dilation
    )
    expected.sin().sum().backward()
    layer = quantized(layer)
    input.requires_grad_()
    output = layer(input)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    layer.zero_grad()
    output.sin().sum().backward()
    # Symmetric weights are never clipped.
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(input.grad, values.grad * passes, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("axis", "own_axis"), [(0, 1), (1, 0), (-3, 1), (None, None)])
def test_axes_count_in_the_layout_of_a_convolution(axis, own_axis):
    torch.manual_seed(0)
    scheme = QuantizationScheme() if axis is None else QuantizationScheme(
        granularity="channel", axis=axis
    )  # fmt: skip
    layer = quantized(nn.ConvTranspose1d(3, 5, 2), scheme=scheme)
    check(layer, torch.randn(2, 3, 4, requires_grad=True), F.conv_transpose1d, axis=own_axis)


@pytest.mark.parametrize("size", [(7, 5), (8, 6), (2, 4, 7, 6), [8, 5]])
def test_the_output_size_can_be_chosen(size):
    torch.manual_seed(0)
    layer = quantized(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1))
    padding = [size[-2] - 7, size[-1] - 5]

    def operation(input, weight, bias):
        return F.conv_transpose2d(input, weight, bias, 2, 1, padding)

    input = torch.randn(2, 3, 4, 3, requires_grad=True)
    check(layer, input, operation, axis=1, output_size=size)
    with pytest.raises(ValueError, match="requested an output size"):
        layer(input, output_size=(9, 5))


@pytest.mark.parametrize("axis", [0, None])
def test_transformers_conv1d_has_a_scale_for_each_output(axis):
    torch.manual_seed(0)
    layer = Conv1D(4, 6)
    layer.bias.data.normal_()
    scheme = QuantizationScheme() if axis is None else QuantizationScheme(granularity="channel")
    layer = quantized(layer, scheme=scheme)
    assert isinstance(layer, Conv1D)

    def operation(input, weight, bias):
        return input @ weight + bias

    check(
        layer,
        torch.randn(2, 3, 6, requires_grad=True),
        operation,
        axis=None if axis is None else 1,
    )

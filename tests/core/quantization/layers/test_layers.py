"""Linear, convolution and embedding against numpy's arithmetic and torch's float operation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.layers import embedding
from layer_reference import check, quantized

CONVOLUTIONS = {1: (nn.Conv1d, F.conv1d), 2: (nn.Conv2d, F.conv2d), 3: (nn.Conv3d, F.conv3d)}


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
@pytest.mark.parametrize("rows", [6, 60])
def test_embedding_equals_the_reference(padding_idx, by_frequency, rows):
    torch.manual_seed(0)
    layer = nn.Embedding(rows, 3, padding_idx, scale_grad_by_freq=by_frequency)
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


ROW_SCHEMES = [
    QuantizationScheme(granularity="channel"),
    QuantizationScheme(3, symmetric=False, granularity="channel", signed=False),
    QuantizationScheme(4, granularity="group", group_size=3),
]


@pytest.mark.parametrize("scheme", ROW_SCHEMES, ids=str)
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_rows_that_are_looked_up_are_quantized_alone_and_equally(scheme, shape, monkeypatch):
    torch.manual_seed(0)
    layer = quantized(nn.Embedding(20, 8, padding_idx=1), scheme=scheme, weight_only=True)
    with torch.no_grad():
        layer.weight[3] = torch.nan
    indices = torch.randint(20, shape)

    def run():
        layer.zero_grad()
        output = layer(indices)
        (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
        return output.detach(), layer.weight.grad.clone()

    tables = []
    monkeypatch.setattr(layer, "quantized_weight", lambda: tables.append(1))
    found = run()
    monkeypatch.undo()
    assert not tables
    monkeypatch.setattr(embedding, "_has_ranges_of_rows", lambda quantizer: False)
    for one, other in zip(found, run(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_whoever_looks_at_a_table_s_quantizer_is_shown_the_table():
    layer = quantized(nn.Embedding(20, 8), weight_only=True)
    seen = []
    layer.weight_quantizer.register_forward_hook(lambda *call: seen.append(call[1][0].shape))
    layer(torch.tensor([1, 2]))
    assert seen == [(20, 8)]


def test_a_table_is_exported_for_any_number_of_rows():
    layer = quantized(nn.Embedding(20, 8), weight_only=True).eval()
    batch = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(layer, (torch.arange(5),), dynamic_shapes=batch)
    indices = torch.randint(20, (50,))
    assert torch.equal(program.module()(indices), layer(indices))


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

"""The class change in place, of every kind of layer."""

import pytest
import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from compression_manager.quantization import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
)
from compression_manager.quantization.layers import (
    QUANTIZED_CLASSES,
    QuantizedLayer,
    restore_layer,
)
from layer_reference import quantized

ARGUMENTS = {
    nn.Linear: (6, 3),
    NonDynamicallyQuantizableLinear: (6, 3),
    nn.Embedding: (6, 3),
    nn.EmbeddingBag: (6, 3),
    nn.MultiheadAttention: (6, 2),
    nn.LSTM: (6, 3),
    nn.GRU: (6, 3),
    nn.RNN: (6, 3),
    QuantizableMatmul: (),
    QuantizableAdd: (),
    QuantizableAttention: (),
}
INDICES = torch.tensor([[0, 5], [3, 3]])
DIMENSIONS = {
    nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3,
    nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3,
}  # fmt: skip


def build(kind):
    return kind(*ARGUMENTS.get(kind, (6, 3, 1)))


def call(kind, layer):
    if kind in (nn.Embedding, nn.EmbeddingBag):
        return layer(INDICES)
    torch.manual_seed(0)
    input = torch.randn(2, 6, *[4] * DIMENSIONS[kind]) if kind in DIMENSIONS else None
    if kind is nn.MultiheadAttention:
        return layer(*torch.randn(3, 4, 2, 6))[0]
    if kind in (nn.LSTM, nn.GRU, nn.RNN):
        return layer(torch.randn(4, 2, 6))[0]
    if kind in (QuantizableMatmul, QuantizableAdd):
        return layer(*torch.randn(2, 3, 4, 4))
    if kind is QuantizableAttention:
        return layer(*torch.randn(3, 2, 2, 4, 6))
    return layer(torch.randn(2, 6) if input is None else input)


@pytest.mark.parametrize("kind", QUANTIZED_CLASSES)
def test_the_class_changes_in_place(kind):
    torch.manual_seed(0)
    layer = build(kind)
    model = nn.Sequential(nn.Identity(), layer)
    parameters = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in parameters.items()}
    float_output = call(kind, layer).detach()
    unrelated = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([unrelated, *model.parameters()], 0.1)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append(module))

    changed = quantized(layer)

    assert changed is layer is model[1]
    assert isinstance(layer, kind)
    assert isinstance(layer, QuantizedLayer)
    now = dict(model.named_parameters())
    assert list(now) == list(parameters)
    assert all(now[name] is parameters[name] for name in now)
    output = call(kind, layer)
    assert seen == [layer]
    assert 0 < (output - float_output).abs().max() < 0.1
    (output.square().sum() * unrelated).backward()
    optimizer.step()
    for name, value in now.items():
        assert not torch.equal(value, before[name]), name

    restore_layer(changed)

    assert type(layer) is kind
    assert list(layer.state_dict()) == list(build(kind).state_dict())
    assert [type(child) for child in layer.children()] == [
        type(child) for child in build(kind).children()
    ]
    expected = build(kind)
    expected.load_state_dict(layer.state_dict())
    assert torch.equal(call(kind, layer), call(kind, expected))


@pytest.mark.parametrize("kind", QUANTIZED_CLASSES)
def test_without_quantizing_the_layer_computes_what_the_float_layer_does(kind):
    torch.manual_seed(0)
    layer = build(kind)
    expected = call(kind, layer)
    torch.testing.assert_close(call(kind, quantized(layer, on=False)), expected)

"""ReLU that keeps bits: the same numbers, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.selection import active_passes
from compression_manager.quantization.layers import relu
from compression_manager.quantization.layers.relu import BitMaskReLU, keep_bits, keep_outputs
from integer_layers import each_passes, quantized

pytestmark = pytest.mark.usefixtures("each_passes")
__all__ = ["each_passes"]

SHAPES = [(7,), (3, 5), (2, 3, 5, 7), (1, 1, 1, 1)]


def _saved_bytes(run: Any) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(sizes.values())


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_values_and_gradients_are_those_of_torch(shape: Any, inplace: bool, format: Any) -> None:
    if format == torch.channels_last and len(shape) != 4:
        format = torch.contiguous_format
    torch.manual_seed(0)
    values = torch.randn(shape).round(decimals=1).contiguous(memory_format=format)
    gradient = torch.randn(shape)  # contiguous, whatever the format of the input
    results = []
    for module in (BitMaskReLU(inplace), nn.ReLU(inplace)):
        leaf = values.clone(memory_format=torch.preserve_format).requires_grad_()
        input = leaf * 1.0
        output = module(input)
        assert (output.data_ptr() == input.data_ptr()) == inplace
        output.backward(gradient)
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].stride() == results[1][0].stride()


def test_in_place_the_input_is_what_is_differentiated() -> None:
    leaf = torch.linspace(-1.0, 1.0, 8, requires_grad=True)
    hidden = leaf * 1.0
    BitMaskReLU(inplace=True)(hidden)
    hidden.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, (leaf > 0).float())


def test_not_a_number_passes_and_zero_does_not() -> None:
    leaf = torch.tensor([torch.nan, 0.0, -0.0, torch.inf, -torch.inf, 1.0], requires_grad=True)
    BitMaskReLU()(leaf).backward(torch.full((6,), torch.inf))
    expected = leaf.detach().clone().requires_grad_()
    nn.ReLU()(expected).backward(torch.full((6,), torch.inf))
    assert leaf.grad is not None
    assert expected.grad is not None
    assert torch.equal(leaf.grad, expected.grad)


def test_one_bit_per_element_is_kept() -> None:
    input = torch.randn(64, 64, requires_grad=True)
    assert _saved_bytes(lambda: BitMaskReLU()(input)) == 64 * 64 // 8
    assert _saved_bytes(lambda: nn.ReLU()(input)) == 64 * 64 * 4


class Labelled(Tensor):
    """Memory that a subclass may hold elsewhere is not for kernels."""


@pytest.mark.parametrize(
    "input",
    [torch.randn(4, 4).as_subclass(Labelled).requires_grad_(),
     torch.randn(4, 4), torch.randn(4, 4, dtype=torch.float64, requires_grad=True),
     torch.randn(0, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True).t()[1:]],
)  # fmt: skip
def test_other_inputs_are_left_to_torch(input: Tensor) -> None:
    output = BitMaskReLU()(input)
    assert torch.equal(output, input.relu())
    assert "BitMask" not in str(output.grad_fn)


def test_an_accelerator_s_memory_is_left_to_torch() -> None:
    input = torch.empty(4, 4, device="meta", requires_grad=True)
    output = BitMaskReLU()(input)
    assert output.device == input.device
    assert "BitMask" not in str(output.grad_fn)


class Doubling(nn.ReLU):
    """A class of the user's own, which computes as it says."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def test_modules_and_activations_change_there_and_back() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    decoder = nn.TransformerDecoderLayer(8, 2, 16)
    other = nn.TransformerEncoderLayer(8, 2, 16, activation="gelu")
    model = nn.Sequential(layer, nn.ReLU(), other, decoder, Doubling())

    def kinds() -> tuple[object, ...]:
        return type(model[1]), layer.activation, decoder.activation

    for end in (lambda undo: undo(), lambda undo: keep_outputs(model)):
        undo = keep_bits(model)
        assert kinds() == (BitMaskReLU, relu.relu, relu.relu)
        assert (other.activation, type(model[4])) == (F.gelu, Doubling)
        end(undo)
        assert kinds() == (nn.ReLU, F.relu, F.relu)
        assert (other.activation, type(model[4])) == (F.gelu, Doubling)


def test_an_encoder_layer_trains_to_the_same_bits() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 256, dropout=0.0, batch_first=True)
    input = torch.randn(2, 5, 8)
    results = []
    for change in (lambda model: None, keep_bits):
        change(layer)
        layer.zero_grad()
        kept = _saved_bytes(lambda: layer(input))
        layer(input).square().sum().backward()
        results.append((kept, [parameter.grad.clone() for parameter in layer.parameters()]))
    # linear2 keeps its float input, which is the output, so that only the bits are added here.
    assert results[1][0] == results[0][0] + 2 * 5 * 256 // 8
    for one, two in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one, two)


def test_differentiating_twice_is_refused() -> None:
    input = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(relu.relu(input).square().sum(), input, create_graph=True)
    with pytest.raises(QuantizationError, match=r'use QATConfig\(forward="fake"\)'):
        gradient.sum().backward()


def test_a_gradient_that_no_number_changes_can_be_part_of_a_loss() -> None:
    input = torch.randn(3, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(relu.relu(input).sum(), input, create_graph=True)
    (gradient.square().sum() + input.sum()).backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.ones(3, 4))


@pytest.mark.parametrize("inplace", [False, True])
def test_native_kernels_find_the_range_for_the_layer_behind_on_the_way(
    inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    input = torch.randn(64, 24)
    layer = quantized(nn.Linear(24, 16), input.relu(), "integer")
    asked: list[Tensor] = []
    kind = type(active_passes())
    find = kind.ends
    monkeypatch.setattr(
        kind, "ends", lambda passes, tensor: asked.append(tensor) or find(passes, tensor)
    )
    before = BitMaskReLU(inplace)
    outputs = [
        layer(values.relu() if plain else before(values * 1.0))
        for plain in (True, False)
        for values in [(2.0 * input).requires_grad_()]
    ]
    assert torch.equal(*outputs)
    assert len(asked) == (1 if active_passes().name == "native" else 2)

"""ReLU that keeps bits: the same numbers, and less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.layers.relu import BitMaskReLU, keep_bits, keep_output

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
    for relu in (BitMaskReLU(inplace), nn.ReLU(inplace)):
        leaf = values.clone(memory_format=torch.preserve_format).requires_grad_()
        input = leaf * 1.0
        output = relu(input)
        assert (output.data_ptr() == input.data_ptr()) == inplace
        output.backward(gradient)
        results.append((output.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][0].stride() == results[1][0].stride()


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


@pytest.mark.parametrize(
    "input",
    [torch.randn(4, 4), torch.randn(4, 4, dtype=torch.float64, requires_grad=True),
     torch.randn(0, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True).t()[1:]],
)  # fmt: skip
def test_other_inputs_are_left_to_torch(input: Tensor) -> None:
    output = BitMaskReLU()(input)
    assert torch.equal(output, input.relu())
    assert "BitMask" not in str(output.grad_fn)


def test_the_class_changes_there_and_back() -> None:
    module = nn.ReLU()
    keep_bits(module)
    assert type(module) is BitMaskReLU
    keep_output(module)
    assert type(module) is nn.ReLU

"""Inputs are quantized once for all their readers, weights once for each of their values."""

from __future__ import annotations

import copy
import gc
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.integer.operands import forget_weights
from compression_manager.quantization.integer.selection import TORCH, passes_for, use_passes
from compression_manager.quantization.integer.torch_passes import TorchPasses
from integer_layers import pretended, quantized, run


class Counting(TorchPasses):
    """Counts what is quantized."""

    def __init__(self) -> None:
        self.inputs = self.weights = self.input_values = self.weight_values = 0

    def quantize(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        self.inputs += 1
        return super().quantize(*args, **options)

    def quantize_rows(self, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.weights += 1
        return super().quantize_rows(weight, values)

    def dequantize(self, *args: Any) -> Tensor:
        self.input_values += 1
        return super().dequantize(*args)

    def dequantize_rows(self, *args: Any) -> Tensor:
        self.weight_values += 1
        return super().dequantize_rows(*args)


def _layers(count: int, range_of: Tensor) -> list[nn.Module]:
    torch.manual_seed(0)
    return [quantized(nn.Linear(8, 4), range_of) for _ in range(count)]


@pytest.fixture
def counting() -> Any:
    passes = Counting()
    with use_passes(passes):
        yield passes


def test_one_input_of_several_layers_is_quantized_once(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layers = _layers(3, input)
    alone = [run(copy.deepcopy(layer), input)[0] for layer in layers]
    counting.inputs = 0
    for layer, expected in zip(layers, alone, strict=True):
        assert torch.equal(layer(input), expected)
    assert counting.inputs == 1


def test_float32_products_share_the_values_of_one_input(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    input = torch.randn(6, 8, requires_grad=True)
    layers = _layers(3, input.detach())
    with pretended(monkeypatch, vnni=False, amx=False):
        outputs = [layer(input) for layer in layers]
        # Those of a weight are written along with its integers.
        assert (counting.input_values, counting.weight_values) == (1, 3)
        sum(output.sum() for output in outputs).backward()
    assert counting.input_values == 1
    assert counting.weight_values == 5  # that of the last layer is there still


def test_other_scales_mean_other_integers(counting: Counting) -> None:
    input = torch.randn(6, 8)
    first, second = _layers(1, input)[0], _layers(1, input * 2)[0]
    first(input), second(input)
    assert counting.inputs == 2


def test_an_input_changed_in_place_is_quantized_anew(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer, other = _layers(2, input)
    layer(input)
    input.mul_(0.5)
    with use_passes(TorchPasses()):
        expected = copy.deepcopy(other)(input.clone())
    assert torch.equal(other(input), expected)
    assert counting.inputs == 2


def test_another_input_in_the_same_memory_is_quantized_anew(counting: Counting) -> None:
    storage = torch.zeros(6, 8)
    layer = _layers(1, torch.randn(6, 8))[0]
    for value in (0.1, 0.2, 0.3):
        torch.full((6, 8), value, out=storage)
        alias = storage.detach()
        expected = layer(torch.full((6, 8), value))
        assert torch.equal(layer(alias), expected)


def test_nothing_keeps_an_input_alive(counting: Counting) -> None:
    layer = _layers(1, torch.randn(6, 8))[0]
    input = torch.randn(6, 8)
    with torch.no_grad():
        layer(input)
    watched = ref(input)
    del input
    gc.collect()
    assert watched() is None


def test_weights_are_quantized_once_for_accumulated_gradients_and_evaluation(
    counting: Counting,
) -> None:
    input = torch.randn(6, 8)
    layer = _layers(1, input)[0]
    for _ in range(3):
        layer(input).sum().backward()
    assert counting.weights == 1
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            layer(input)
    assert counting.weights == 2  # once more, because weights may be exchanged for evaluation


def test_a_changed_weight_is_quantized_anew(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layers(1, input)[0]
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for count in range(1, 4):
        layer(input).sum().backward()
        optimizer.step()
        assert counting.weights == count


@pytest.mark.parametrize("change", ["replaced", "written and forgotten", "written before eval"])
def test_weights_changed_behind_autograd_are_seen(counting: Counting, change: str) -> None:
    input = torch.randn(6, 8)
    layer = _layers(1, input)[0]
    layer(input)
    weight = layer.get_parameter("weight")
    if change == "replaced":
        weight.data = torch.randn(4, 8)
    else:
        weight.data.mul_(-1.0)
    if change == "written and forgotten":
        forget_weights()
    if change == "written before eval":
        layer.eval()
    expected = copy.deepcopy(layer)(input)
    assert torch.equal(layer(input), expected)


def test_a_copy_has_integers_of_its_own(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layer = _layers(1, input)[0]
    before = layer(input)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.get_parameter("weight").mul_(-1.0)
    assert not torch.equal(twin(input), before)
    assert torch.equal(layer(input), before)


def test_inference_mode(counting: Counting) -> None:
    input = torch.randn(6, 8)
    layers = _layers(2, input)
    expected = layers[0](input)
    with torch.inference_mode():
        fresh = input.clone()
        assert torch.equal(layers[0](fresh), expected)
        fresh.mul_(0.5)
        assert not torch.equal(layers[0](fresh), expected)


def test_only_the_memory_of_the_cpu_is_left_to_other_passes(counting: Counting) -> None:
    assert passes_for(torch.device("cpu")) is counting
    assert passes_for(torch.device("cuda")) is TORCH

"""Inputs are quantized once for all their readers."""

from __future__ import annotations

import copy
import gc
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization import QuantizationScheme, quantize
from compression_manager.quantization.integer.bits import pack_mask
from compression_manager.quantization.integer.operands import (
    integer_input,
    why_no_integer_weight,
)
from compression_manager.quantization.integer.selection import TORCH, passes_for, use_passes
from compression_manager.quantization.integer.torch_passes import TorchPasses
from compression_manager.quantization.tensors.recent import remembered
from integer_layers import Counting, pretended, quantized, quantizer, run


def _layers(count: int, range_of: Tensor) -> list[nn.Module]:
    torch.manual_seed(0)
    return [quantized(nn.Linear(8, 4), range_of) for _ in range(count)]


def computed(values: Tensor) -> Tensor:
    """`values` as a result of the model, which layers share."""
    return values.clone().requires_grad_() * 1.0


@pytest.fixture
def counting() -> Any:
    passes = Counting()
    with use_passes(passes):
        yield passes


def test_one_input_of_several_layers_is_quantized_once(counting: Counting) -> None:
    input = computed(torch.randn(6, 8))
    layers = _layers(3, input.detach())
    alone = [run(copy.deepcopy(layer), input)[0] for layer in layers]
    counting.inputs = 0
    for layer, expected in zip(layers, alone, strict=True):
        assert torch.equal(layer(input), expected)
    assert counting.inputs == 1


def test_float32_products_share_the_values_of_one_input(
    counting: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    input = computed(torch.randn(6, 8))
    layers = _layers(3, input.detach())
    with pretended(monkeypatch, vnni=False, amx=False):
        outputs = [layer(input) for layer in layers]
        # Those of a weight are written along with its integers.
        assert (counting.input_values, counting.weight_values) == (1, 3)
        sum(output.sum() for output in outputs).backward()
    assert counting.input_values == 1
    assert counting.weight_values == 5  # that of the last layer is there still


def test_other_scales_mean_other_integers(counting: Counting) -> None:
    input = computed(torch.randn(6, 8))
    first, second = (_layers(1, input.detach() * factor)[0] for factor in (1, 2))
    first(input), second(input)
    assert counting.inputs == 2


def test_an_input_changed_in_place_is_quantized_anew(counting: Counting) -> None:
    input = computed(torch.randn(6, 8))
    layer, other = _layers(2, input.detach())
    layer(input)
    input.mul_(0.5)
    with use_passes(TorchPasses()):
        expected = copy.deepcopy(other)(input.clone())
    assert torch.equal(other(input), expected)
    assert counting.inputs == 2


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_a_buffer_that_numpy_fills_anew_is_quantized_anew(counting: Counting, mode: str) -> None:
    memory = np.zeros((6, 8), np.float32)
    buffer = torch.from_numpy(memory)
    layer = _layers(1, torch.randn(6, 8))[0].train(mode == "training")
    for seed in range(3):
        memory[:] = np.random.default_rng(seed).normal(size=(6, 8))
        with torch.set_grad_enabled(mode == "training"):
            expected = copy.deepcopy(layer)(buffer.clone())
            assert torch.equal(layer(buffer), expected)


def test_another_input_in_the_same_memory_is_quantized_anew(counting: Counting) -> None:
    storage = torch.zeros(6, 8)
    layer = _layers(1, torch.randn(6, 8))[0]
    for value in (0.1, 0.2, 0.3):
        torch.full((6, 8), value, out=storage)
        alias = storage.detach()
        expected = layer(torch.full((6, 8), value))
        assert torch.equal(layer(alias), expected)


def test_a_part_of_an_input_is_another_input() -> None:
    input = computed(torch.randn(6, 8))
    remembered(input)["whole"] = True
    assert "whole" in remembered(input)
    assert "whole" not in remembered(input[:3])
    assert "whole" not in remembered(input.view(8, 6))
    with torch.inference_mode():
        assert "whole" not in remembered(input)


def test_nothing_keeps_an_input_alive(counting: Counting) -> None:
    layer = _layers(1, torch.randn(6, 8))[0]
    input = computed(torch.randn(6, 8))
    with torch.no_grad():
        layer(input)
    watched = ref(input)
    del input
    gc.collect()
    assert watched() is None


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


@pytest.mark.parametrize("sign", [1, -1])
def test_an_end_that_float32_rounds_to_the_next_integer_is_clipped(sign: int) -> None:
    """Just within the range as an exact product, and in the middle between two in float32."""
    scheme = QuantizationScheme(8)
    generator, found = np.random.default_rng(0), 0
    made = quantizer(scheme, "activation", torch.ones(1))
    for scale in generator.uniform(0.01, 1.0, 200).astype(np.float32):
        inverse = np.float32(1) / scale
        value = np.float32(127.5 / np.float64(inverse))
        exact = np.float64(value) * np.float64(inverse)
        if exact >= 127.5 or np.float32(exact) < 127.5:
            continue
        found += 1
        input = torch.tensor([sign * value, 0.0])
        made.scale.fill_(scale)
        integers = integer_input(made, input, TORCH)
        assert integers is not None
        assert torch.equal(integers.codes, quantize(input, made.scale, made.zero_point, -127, 127))
        assert integers.clipped is not None
        assert torch.equal(integers.clipped, pack_mask(torch.tensor([True, False])))
    assert found > 10


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (QuantizationScheme(8, granularity="channel"), None),
        (QuantizationScheme(4), None),
        (QuantizationScheme(9), "9 bits"),
        (QuantizationScheme(8, False), "not symmetric around zero"),
        (QuantizationScheme(8, signed=False), "not symmetric around zero"),
        (QuantizationScheme(1), "not symmetric around zero"),
        (QuantizationScheme(8, granularity="channel", axis=1), "within an output channel"),
        (QuantizationScheme(8, granularity="group"), "within an output channel"),
    ],
    ids=str,
)
def test_weights_that_are_operands(scheme: QuantizationScheme, reason: str | None) -> None:
    found = why_no_integer_weight(scheme)
    assert (found is None) if reason is None else (found is not None and reason in found)

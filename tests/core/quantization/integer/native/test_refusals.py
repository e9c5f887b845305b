"""What the native passes are not made for, which plain operations would tell by themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.native import NativePasses


def test_what_does_not_fit_is_refused(passes: NativePasses) -> None:
    input = torch.zeros(4, 6)
    with pytest.raises(QuantizationError, match=r"input is a dense float32 .*strides \(12, 2\)"):
        passes.relu(torch.zeros(4, 12)[:, ::2])
    with pytest.raises(QuantizationError, match=r"input is a dense float32 .*float64"):
        passes.quantize(input.double(), 1.0, 0, -128, 127, below=True, above=True)
    with pytest.raises(QuantizationError, match="got the range 0 to 256"):
        passes.quantize(input, 1.0, 0, 0, 256, below=True, above=True)
    with pytest.raises(QuantizationError, match="zero point 9"):
        passes.quantize(input, 1.0, 9, 0, 7, below=True, above=True)
    with pytest.raises(QuantizationError, match="codes is a dense uint8 or int8"):
        passes.dequantize(input, 1.0, 0, torch.empty(4, 6))
    with pytest.raises(QuantizationError, match="values are float32 or bfloat16"):
        passes.dequantize(input.char(), 1.0, 0, input.half())
    with pytest.raises(QuantizationError, match="values have the shape and strides of their codes"):
        passes.dequantize(input.char(), 1.0, 0, torch.empty(6, 4).t())
    with pytest.raises(QuantizationError, match="addend is a dense float32"):
        passes.add_dequantized(input.double(), input.char(), 1.0, 0)
    with pytest.raises(QuantizationError, match="values have the shape and strides of their codes"):
        passes.add_dequantized(torch.empty(6, 4).t(), input.char(), 1.0, 0)
    with pytest.raises(QuantizationError, match="mask of 24 elements has 3 bytes"):
        passes.clear_clipped(input, torch.zeros(4, dtype=torch.uint8))
    with pytest.raises(QuantizationError, match="mask of 24 elements has 3 bytes"):
        passes.relu_gradient(input, torch.zeros(2, dtype=torch.uint8))
    with pytest.raises(QuantizationError, match="one element for each row"):
        passes.dequantize_rows(input.char(), torch.ones(6), torch.empty(4, 6))
    with pytest.raises(QuantizationError, match="on the CPU"):
        passes.relu(torch.zeros(3, device="meta"))


def test_only_weights_whose_rows_follow_one_another_are_taken(passes: NativePasses) -> None:
    for weight in (torch.zeros(6, 4).t(), torch.zeros(()), torch.zeros(3, 0), torch.zeros(0, 3)):
        with pytest.raises(QuantizationError, match="weight has rows of at least one element"):
            passes.quantize_rows(weight)


def test_values_of_rows_lie_as_their_weight_does(passes: NativePasses) -> None:
    with pytest.raises(QuantizationError, match="values have the shape and strides"):
        passes.quantize_rows(torch.ones(6, 4), torch.empty(4, 6))
    with pytest.raises(QuantizationError, match="values is a dense float32 tensor"):
        passes.quantize_rows(torch.ones(6, 4), torch.empty(6, 4, dtype=torch.bfloat16))


def test_convolutions_that_do_not_fit_are_refused(passes: NativePasses) -> None:
    codes = torch.zeros(2, 3, 5, 5, dtype=torch.uint8)
    weight, scale, bias = torch.ones(4, 3, 3, 3, dtype=torch.int8), torch.ones(4), torch.ones(4)
    its = Geometry((1, 1), (1, 1), (1, 1), 1)

    def refused(message: str, *arguments: Any) -> None:
        with pytest.raises(QuantizationError, match=message):
            passes.convolve_integers(*arguments)

    refused("codes is a dense uint8", codes.view(torch.int8), weight, 7, scale, bias, its)
    refused("channels last", codes.transpose(2, 3), weight, 7, scale, bias, its)
    refused("as many channels", codes[:, :2].contiguous(), weight, 7, scale, bias, its)
    refused("spatial dimensions", codes[0], weight, 7, scale, bias, its)
    for change in ({"stride": (0, 1)}, {"dilation": (1, 0)}, {"padding": (-1, 0)}):
        changed = its._replace(**change)
        refused("is 0 and no padding negative", codes, weight, 7, scale, bias, changed)
    refused("larger than the padded", codes, weight, 7, scale, bias, its._replace(dilation=(4, 4)))
    refused("between 0 and 255, got 256", codes, weight, 256, scale, bias, its)
    refused("scale has 4 elements", codes, weight, 7, scale[:3], bias, its)
    refused("bias has 4 elements", codes, weight, 7, scale, bias[:3], its)
    large = torch.zeros(1, 65794, 1, dtype=torch.uint8)
    line = Geometry((1,), (0,), (1,), 1)
    refused("up to 65793", large, large.view(torch.int8), 0, torch.ones(1), None, line)

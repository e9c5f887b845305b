"""Layers with integer operands, and what they must compute; shared by tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compression_manager.quantization import (
    MinMaxObserver,
    ObservedFakeQuantizer,
    QuantizationScheme,
    QuantizationSite,
)
from compression_manager.quantization.integer import cpu_features, rule
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import (
    TORCH,
    active_passes,
    prepare_native,
    use_passes,
)
from compression_manager.quantization.integer.torch_passes import TorchPasses
from compression_manager.quantization.layers import QuantizedLayer, quantize_layer

WEIGHT = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)
INPUT = QuantizationScheme(bits=8, symmetric=False, signed=False)


def quantizer(
    scheme: QuantizationScheme, role: Any, tensor: Tensor, shape: tuple[int, ...] | None = None
) -> ObservedFakeQuantizer:
    """Return a quantizer that computes already, its range that of `tensor`."""
    channels = None if scheme.axis is None else tensor.shape[scheme.axis]
    site = QuantizationSite("layer", role, channels, tensor.device, shape)
    made = ObservedFakeQuantizer(scheme, site, MinMaxObserver(scheme, site)).to(tensor.device)
    made.set_phase(observing=True, quantizing=False)
    if role == "activation":
        made.train()(tensor)
    made.set_phase(observing=False, quantizing=True)
    return made


def quantized(
    layer: nn.Module,
    range_of: Tensor,
    forward: Any = "auto",
    *,
    weight: QuantizationScheme = WEIGHT,
    input: QuantizationScheme = INPUT,
) -> QuantizedLayer:
    """Turn `layer` into its quantization-aware form; its input's range is that of `range_of`."""
    parameter = layer.get_parameter("weight").detach()
    changed = quantize_layer(
        layer,
        quantizer(weight, "weight", parameter, tuple(parameter.shape)),
        quantizer(input, "activation", range_of),
    )
    changed.product_options = ProductOptions(forward)
    return changed


def run(layer: nn.Module, input: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Return the output, and the gradients of input and parameters for a fixed loss."""
    leaf = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    output = layer(leaf)
    weights = torch.linspace(-1.0, 1.0, output.numel(), device=output.device)
    (output * weights.reshape(output.shape)).sum().backward()
    gradients = [leaf.grad, *(parameter.grad for parameter in layer.parameters())]
    return output.detach(), [None if item is None else item.clone() for item in gradients]


def exact(layer: QuantizedLayer, input: Tensor) -> np.ndarray:
    """Return the output from int64 sums and float64 scales, independent of the layer's passes."""
    part = layer.parts()[""]
    assert part.weight is not None
    assert part.input_quantizer is not None
    assert part.weight_quantizer is not None
    numbers = part.input_quantizer.quantization_parameters()
    weights = part.weight_quantizer.quantization_parameters(part.weight)
    codes = np.rint(input.detach().cpu().numpy() * (np.float32(1) / numbers.scale.cpu().numpy()))
    zero_point = int(numbers.zero_point)
    codes = np.clip(codes + zero_point, numbers.quant_min, numbers.quant_max) - zero_point
    rows = part.weight.shape[0]
    scale = weights.scale.cpu().double().expand(rows).numpy()
    column = (-1, *[1] * (part.weight.dim() - 1))
    steps = part.weight.detach().cpu().numpy() * (np.float32(1) / np.float32(scale)).reshape(column)
    integers = np.clip(np.rint(steps), weights.quant_min, weights.quant_max)
    left, right = torch.from_numpy(codes).double(), torch.from_numpy(integers).double()
    spatial = [1] * (part.weight.dim() - 2)
    if spatial:
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(spatial)]
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        sums = convolve(left, right, None, *geometry).numpy()
        scale = scale.reshape(-1, *spatial)
    else:
        sums = (left @ right.t()).numpy()
    output = sums * (float(numbers.scale) * scale)
    if part.bias is not None:
        bias = part.bias.detach().cpu().double().numpy()
        output = output + bias.reshape(-1, *spatial)
    return output


class FastPasses(TorchPasses):
    """Plain passes that say that they multiply integers fast on any CPU."""

    def supports_integers(self) -> bool:
        return True


@contextmanager
def pretended(monkeypatch: Any, *, vnni: bool, amx: bool, bfloat16: bool = False) -> Iterator[None]:
    """Let the rule, and nothing else, believe in a CPU of these features."""
    features = cpu_features.CpuFeatures(vnni, amx, bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(rule, "cpu_features", lambda: features)
        yield


@pytest.fixture(params=["torch", "native"])
def each_passes(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both implementations of the passes, one after the other."""
    if request.param == "torch":
        with use_passes(TORCH):
            yield "torch"
        return
    reason = prepare_native()
    if reason is not None:
        pytest.skip(reason)
    with use_passes(active_passes()):
        yield "native"


class Counting(TorchPasses):
    """Counts what is quantized, and what is turned back."""

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

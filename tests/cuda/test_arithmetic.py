"""The arithmetic is the same to the last bit on every device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compression_manager.quantization import (
    QuantizationScheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from compression_manager.quantization.arithmetic.ranges import tensor_range
from device_runs import DTYPES, assert_same_bits, assert_same_state

BITS = (1, 2, 4, 8, 16, 24, 32)
GRANULARITIES = {
    "tensor": {},
    "channel": {"axis": 1},
    "group": {"group_size": 7},
    "token": {"dynamic": True},
}


def scheme(bits: int, symmetric: bool, granularity: str) -> QuantizationScheme:
    return QuantizationScheme(bits, symmetric, granularity, **GRANULARITIES[granularity])


every_scheme = pytest.mark.parametrize(
    "of",
    [scheme(b, s, g) for b in BITS for s in (True, False) for g in GRANULARITIES],
    ids=str,
)


def layouts() -> Iterator[tuple[str, Tensor]]:
    """float64 tensors in every layout, with ties, infinities and NaN."""
    base = torch.randn(6, 4, 5, 3, dtype=torch.float64)
    special = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1e-40, 0.5, -1.5, 3e4]
    base[0, 0].view(-1)[: len(special)] = torch.tensor(special, dtype=torch.float64)
    yield "contiguous", base
    yield "channels_last", base.contiguous(memory_format=torch.channels_last)
    yield "transposed", base.transpose(0, 2)
    yield "strided", base[:, :, ::2]
    yield "flipped", base.flip(0)[1:]
    yield "empty", base[:0]


def parameters(input: Tensor, of: QuantizationScheme) -> tuple[Tensor, Tensor]:
    """A scale and zero point that clip the outermost values."""
    low, high = tensor_range(input.nan_to_num(0.0, 2.0, -2.0), of)
    return choose_qparams(low * 0.7, high * 0.7, of)


def computed(input: Tensor, scale: Tensor, zero_point: Tensor, of: QuantizationScheme) -> dict:
    """All that the arithmetic says about an input."""
    device, options = input.device, {"group_size": of.group_size}
    scale, zero_point = scale.to(device), zero_point.to(device)
    limits = of.quant_min, of.quant_max
    integers = quantize(input, scale, zero_point, *limits, of.axis, **options)
    found = {"integers": integers}
    for dtype in DTYPES:
        values = dequantize(integers, scale, zero_point, of.axis, dtype, **options)
        found[f"values {dtype}"] = values
    upstream = torch.linspace(-2, 2, input.numel(), dtype=torch.float64)
    upstream[:3] = torch.tensor([torch.inf, 0.0, torch.nan])[: input.numel()]
    for passes in (False, True):
        leaf = input.detach().clone().requires_grad_()
        output = fake_quantize(
            leaf,
            scale,
            zero_point,
            *limits,
            of.axis,
            **options,
            pass_clipped_gradient=passes,
        )
        output.backward(upstream.reshape(input.shape).to(device, input.dtype))
        found |= {f"output {passes}": output, f"gradient {passes}": leaf.grad}
    found["without gradient"] = fake_quantize(input, scale, zero_point, *limits, of.axis, **options)
    return found


@every_scheme
def test_integers_values_and_gradients_equal_the_cpus(of, device):
    for layout, base in layouts():
        scale, zero_point = parameters(base, of)
        for dtype in DTYPES:
            # Not .to(device), which would lay the elements out anew.
            there = torch.empty_strided(base.shape, base.stride(), dtype=dtype, device=device)
            there.copy_(base.to(dtype))
            here = torch.empty_strided(base.shape, base.stride(), dtype=dtype)
            here.copy_(base)
            expected = computed(here, scale, zero_point, of)
            actual = computed(there, scale, zero_point, of)
            assert_same_state(actual, expected, f"{layout} {dtype}")


def test_scale_and_zero_point_as_numbers_equal_the_cpus(device):
    x = torch.randn(1000)
    expected = fake_quantize(x, 0.03, 5, -128, 127)
    assert_same_bits(fake_quantize(x.to(device), 0.03, 5, -128, 127), expected)


@every_scheme
def test_choose_qparams_equals_the_cpus(of, device):
    magnitudes = 10.0 ** torch.empty(5000, dtype=torch.float64).uniform_(-42, 38)
    low, high = (-magnitudes, magnitudes.flip(0))
    high[:1000] = low[:1000]
    low[1000:2000] = high[1000:2000]
    low[2000], high[2000] = 0.0, 0.0
    low, high = torch.minimum(low, high).float(), torch.maximum(low, high).float()
    expected = choose_qparams(low, high, of)
    actual = choose_qparams(low.to(device), high.to(device), of)
    for got, wanted in zip(actual, expected, strict=True):
        assert_same_bits(got, wanted)


@every_scheme
def test_ranges_equal_the_cpus(of, device):
    for layout, base in layouts():
        for dtype in DTYPES:
            expected = tensor_range(base.to(dtype), of)
            actual = tensor_range(base.to(device, dtype), of)
            for got, wanted in zip(actual, expected, strict=True):
                same = (got.cpu() == wanted) | (got.cpu().isnan() & wanted.isnan())
                assert same.all(), (layout, dtype)


def test_groups_of_many_short_rows(device):
    """More rows than a grid of CUDA threads has in its second dimension."""
    of = QuantizationScheme(4, granularity="group", group_size=4)
    x = torch.randn(70_000, 6)
    for got, wanted in zip(tensor_range(x.to(device), of), tensor_range(x, of), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")
def test_an_exported_graph_computes_the_same(device):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return fake_quantize(x, self.scale, self.zero_point, -128, 127, 0)

    x = torch.randn(4, 5)
    layer = Layer()
    layer.register_buffer("scale", torch.rand(4) * 0.01)
    layer.register_buffer("zero_point", torch.arange(4))
    expected = layer(x)
    program = torch.export.export(layer.to(device), (x.to(device),))
    assert_same_bits(program.module()(x.to(device)), expected)

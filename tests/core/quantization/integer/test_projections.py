"""Attention's projections of one tensor, computed together, against layers of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization import QuantizationScheme
from compression_manager.quantization.integer import selection
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.layers import QuantizedMultiheadAttention, quantize_layer
from compression_manager.quantization.layers.base import Quantizers, place_quantizers
from compression_manager.quantization.layers.products import linear
from integer_layers import INPUT, WEIGHT, each_passes, quantizer

pytestmark = pytest.mark.usefixtures("each_passes")
__all__ = ["each_passes"]

NAMES = ("query", "key", "value")
WIDTH = 12
PER_TENSOR = QuantizationScheme(bits=8, symmetric=True)


def _attention(
    forward: Any,
    input: Tensor,
    weight: QuantizationScheme = WEIGHT,
    reach: float = 1.0,
    *,
    bias: bool = True,
) -> QuantizedMultiheadAttention:
    """Return quantized attention; `reach` stretches the range of the key's input."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(WIDTH, 3, bias=bias, batch_first=True)
    if bias:
        nn.init.normal_(layer.in_proj_bias)
    operands = QuantizedMultiheadAttention.operands_of(layer)
    made = {}
    for name in NAMES:
        part = operands[name].weight
        assert part is not None
        range_of = input * (reach if name == "key" else 1.0)
        made[name] = Quantizers(
            quantizer(weight, "weight", part.detach(), tuple(part.shape)),
            quantizer(INPUT, "activation", range_of),
        )
    changed = quantize_layer(layer, *made[NAMES[0]])
    assert isinstance(changed, QuantizedMultiheadAttention)
    for name in NAMES:
        place_quantizers(changed, name, made[name])
    changed.product_options = ProductOptions(forward)
    return changed


def _run(layer: QuantizedMultiheadAttention, input: Tensor) -> list[Tensor]:
    """Return projections and gradients, with another reader of the input before and behind."""
    leaf = input.clone().requires_grad_()
    hidden = leaf * 1.5
    projected = layer.project(hidden, hidden, hidden)
    loss = (hidden * 0.3).sin().sum()
    for index, item in enumerate(projected):
        loss = loss + (item * torch.linspace(-1, 1 + index, item.numel()).view_as(item)).sum()
    loss.backward()
    bias = layer.in_proj_bias
    gradients = leaf.grad, layer.in_proj_weight.grad, None if bias is None else bias.grad
    return [item.detach() for item in (*projected, *gradients) if item is not None]


def _scales(layer: QuantizedMultiheadAttention) -> list[float]:
    return [float(item.quantization_parameters().scale) for item in layer.input_quantizers()]


def _count_weights(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    seen: list[Tensor] = []
    passes = type(selection.active_passes())
    original = passes.quantize_rows

    def count(self: Any, weight: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
        seen.append(weight)
        return original(self, weight, values)

    monkeypatch.setattr(passes, "quantize_rows", count)
    return seen


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("forward", ["auto", "integer"])
def test_values_and_gradients_are_those_of_fake_quantization(
    forward: str, clips: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    input = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    range_of = input * (0.9 if clips else 1.5)
    wanted = _run(_attention("fake", range_of, bias=bias), input)
    weights = _count_weights(monkeypatch)
    got = _run(_attention(forward, range_of, bias=bias), input)
    assert len(got) == len(wanted) == 5 + bias
    assert [weight.shape[0] for weight in weights] == [3 * WIDTH]
    for one, other in zip(got[:3], wanted[:3], strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max()
    for one, other in zip(got[3:], wanted[3:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("different", [{"reach": 1.3}, {"weight": PER_TENSOR}], ids=str)
def test_what_is_quantized_otherwise_is_computed_apart(
    different: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    input = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    wanted = _run(_attention("fake", input, **different), input)
    weights = _count_weights(monkeypatch)
    got = _run(_attention("auto", input, **different), input)
    assert all(weight.shape[0] == WIDTH for weight in weights)
    for one, other in zip(got[3:], wanted[3:], strict=True):
        assert torch.equal(one, other)


def test_the_range_of_each_follows_the_input() -> None:
    input = torch.randn(5, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    layer = _attention("auto", input)
    for item in layer.input_quantizers():
        item.set_phase(observing=True, quantizing=True)
    layer.train()
    _run(layer, input * 2)
    scales = _scales(layer)
    assert len(set(scales)) == 1
    assert scales[0] > 1.9 * _scales(_attention("auto", input))[0]


def test_a_weight_that_stays_as_it_is_needs_no_gradient() -> None:
    input = torch.randn(2, 3, WIDTH)
    layer = _attention("auto", input)
    layer.in_proj_weight.requires_grad_(False)
    torch.cat(layer.project(input, input, input)).sum().backward()
    assert layer.in_proj_weight.grad is None
    assert layer.in_proj_bias.grad is not None
    alone = [linear(part, layer.product_options, input).detach() for part in layer.parts().values()]
    assert all(map(torch.equal, layer.project(input, input, input), alone))

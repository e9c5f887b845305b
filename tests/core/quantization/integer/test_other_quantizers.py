"""Quantizers that integers cannot stand for: products and sums are those of `forward="fake"`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization import (
    MinMaxObserver,
    ObservedFakeQuantizer,
    QuantizableAdd,
    QuantizationSite,
)
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.layers import QuantizedLayer, Quantizers, quantize_parts
from integer_layers import INPUT, quantized, quantizer


class Halving(ObservedFakeQuantizer):
    """Does something of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 0.5


def _derive(made: ObservedFakeQuantizer) -> None:
    made.__class__ = Halving


def _hook(made: ObservedFakeQuantizer) -> None:
    made.register_forward_hook(lambda module, arguments, output: output * 0.5)


def _switch_off(made: ObservedFakeQuantizer) -> None:
    made.set_phase(observing=False, quantizing=False)


def _linear(input: Tensor) -> tuple[QuantizedLayer, list[Tensor]]:
    return quantized(nn.Linear(7, 6), input * 0.5), [input]


def _convolution(input: Tensor) -> tuple[QuantizedLayer, list[Tensor]]:
    return quantized(nn.Conv2d(4, 6, 3), input * 0.5), [input]


def _sum(input: Tensor) -> tuple[QuantizedLayer, list[Tensor]]:
    own = quantizer(INPUT, "activation", input * 0.5)
    layer = quantize_parts(QuantizableAdd(), {"residual": Quantizers(None, own)})
    return layer, [torch.randn_like(input), input]


CASES = [
    (_linear, "input_quantizer"),
    (_linear, "weight_quantizer"),
    (_convolution, "input_quantizer"),
    (_convolution, "weight_quantizer"),
    (_sum, "residual_input_quantizer"),
]


def _outputs(layer: QuantizedLayer, arguments: list[Tensor]) -> list[Tensor]:
    found = []
    for forward in ("fake", "auto", "integer"):
        layer.product_options = ProductOptions(forward)
        found.append(layer(*arguments).detach())
    return found


@pytest.mark.parametrize("change", [_derive, _hook, _switch_off])
@pytest.mark.parametrize(("build", "name"), CASES)
def test_what_a_quantizer_does_of_its_own_is_done(
    build: Callable[[Tensor], Any], name: str, change: Callable[[ObservedFakeQuantizer], None]
) -> None:
    torch.manual_seed(0)
    layer, arguments = build(torch.randn(3, 4, 5, 7))
    plain = _outputs(layer, arguments)[0]
    change(getattr(layer, name))
    wanted, *found = _outputs(layer, arguments)
    assert not torch.allclose(wanted, plain)
    assert all(torch.equal(output, wanted) for output in found)


@pytest.mark.parametrize(
    ("build", "name"), [case for case in CASES if case[1] != "weight_quantizer"]
)
def test_what_was_never_observed_stays_in_floating_point(
    build: Callable[[Tensor], Any], name: str
) -> None:
    torch.manual_seed(0)
    layer, arguments = build(torch.randn(3, 4, 5, 7))
    site = QuantizationSite("layer", "activation")
    new = ObservedFakeQuantizer(INPUT, site, MinMaxObserver(INPUT, site))
    new.set_phase(observing=True, quantizing=True)
    setattr(layer, name, new)
    layer.eval()
    wanted, *found = _outputs(layer, arguments)
    setattr(layer, name, nn.Identity())
    layer.product_options = ProductOptions("fake")
    assert torch.equal(layer(*arguments), wanted)
    assert all(torch.equal(output, wanted) for output in found)

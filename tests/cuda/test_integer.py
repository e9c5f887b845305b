"""Linear layers multiply integers on the GPU, without the CPU waiting for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager.quantization.layers.decisions import last_decision
from device_runs import no_waiting
from integer_layers import exact, quantized, run

SHAPES = [(64, 16, 8), (40, 512, 64), (17, 24, 40)]


def _layer(device: torch.device, inputs: int, outputs: int, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    options = {"forward": "integer", **options}
    return quantized(nn.Linear(inputs, outputs).to(device), **options)


def _path(layer: Any) -> str:
    decision = last_decision(layer.parts()[""])
    assert decision is not None
    return decision.path


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_values_are_exact_and_gradients_those_of_fake_quantization(
    device: torch.device, rows: int, inputs: int, outputs: int, clips: bool
) -> None:
    input = torch.randn(rows, inputs, device=device) + 0.3
    seen = input * (0.7 if clips else 1.0)
    layer = _layer(device, inputs, outputs, range_of=seen)
    fake = _layer(device, inputs, outputs, range_of=seen, forward="fake")
    output, gradients = run(layer, input)
    expected, wanted = run(fake, input)
    if device.type == "cuda":
        assert _path(layer) == "integer"
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    reference = torch.from_numpy(exact(layer, input))
    assert (output.cpu().double() - reference).abs().max() <= 1e-6 * reference.abs().max()
    for got, want in zip(gradients, wanted, strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(16, 16, 8), (64, 12, 8), (64, 16, 9)])
def test_sizes_that_cuda_does_not_multiply_are_left_to_float(
    device: torch.device, rows: int, inputs: int, outputs: int
) -> None:
    input = torch.randn(rows, inputs, device=device)
    layer = _layer(device, inputs, outputs, range_of=input)
    run(layer, input)
    if device.type == "cuda":
        assert _path(layer) == "fake"


def test_nothing_waits_for_the_gpu(device: torch.device) -> None:
    input = torch.randn(64, 16, device=device, requires_grad=True)
    layer = _layer(device, 16, 8, range_of=input)
    layer(input).sum().backward()

    with no_waiting(device):
        layer(input).sum().backward()
    assert input.grad is not None


def test_what_is_not_a_number_shows(device: torch.device) -> None:
    input = torch.randn(64, 16, device=device)
    layer = _layer(device, 16, 8, range_of=input)
    spoiled: Tensor = input.clone()
    spoiled[3, 4] = torch.nan
    assert layer(spoiled)[3].isnan().all()
    infinite = input.clone()
    infinite[3, 4] = torch.inf
    assert layer(infinite).isfinite().all()

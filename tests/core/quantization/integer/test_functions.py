"""Values and gradients of products on integers, against exact sums and fake quantization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    MinMaxObserver,
    ObservedFakeQuantizer,
    QuantizationScheme,
)
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.layers import products as layer_products
from compression_manager.quantization.layers.decisions import last_decision
from integer_layers import each_passes, exact, quantized, run

pytestmark = pytest.mark.usefixtures("each_passes")
__all__ = ["each_passes"]

LINEAR: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "matrix": (lambda: nn.Linear(24, 10), (300, 24)),
    "sequences": (lambda: nn.Linear(17, 5), (4, 7, 17)),
    "no bias": (lambda: nn.Linear(8, 3, bias=False), (2, 8)),
    "one row": (lambda: nn.Linear(8, 3), (8,)),
    "many": (lambda: nn.Linear(700, 33), (70, 700)),
    "like an image": (lambda: nn.Linear(5, 3), (1, 4, 1, 5)),
}
CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "padded": (lambda: nn.Conv2d(3, 8, 3, padding=1), (2, 3, 9, 7)),
    "strided": (lambda: nn.Conv2d(6, 4, 3, stride=2, bias=False), (2, 6, 9, 8)),
    "dilated": (lambda: nn.Conv2d(4, 5, (1, 3), dilation=2, padding=(0, 2)), (3, 4, 6, 6)),
    "pointwise": (lambda: nn.Conv2d(16, 7, 1), (2, 16, 5, 5)),
    "wide": (lambda: nn.Conv2d(64, 6, 3, padding=1), (1, 64, 6, 6)),
    "one axis": (lambda: nn.Conv1d(6, 5, 4, stride=3, padding=2), (3, 6, 17)),
    "three axes": (lambda: nn.Conv3d(4, 5, (1, 3, 2), padding=(0, 1, 1)), (2, 4, 3, 5, 4)),
}
ALL = LINEAR | CONVOLUTIONS
PATHS = {"auto": {"codes", "integer"}, "integer": {"integer"}}


def _case(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = ALL[name]
    return build(), torch.randn(shape) + 0.3


def _formats(input: Tensor) -> list[Tensor]:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    return [input] if last is None else [input, input.contiguous(memory_format=last)]


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_output_is_that_of_exact_sums(name: str, forward: str) -> None:
    layer, input = _case(name)
    # A narrower range than the input's, so that some elements are clipped.
    changed = quantized(layer, input * 0.7, forward)
    for formatted in _formats(input):
        with torch.no_grad():
            output = changed(formatted)
        expected = exact(changed, input)
        assert np.abs(output.double().numpy() - expected).max() <= 1e-6 * np.abs(expected).max()
        decision = last_decision(changed.parts()[""])
        assert decision is not None
        assert decision.path in PATHS[forward]
        assert output.stride() == layer.float_class.forward(layer, formatted).stride()


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_fake_quantization_bit_for_bit(
    name: str, clips: bool, forward: str
) -> None:
    layer, input = _case(name)
    range_of = input * (0.7 if clips else 1.0)
    changed = quantized(layer, range_of, forward)
    twin = quantized(_case(name)[0], range_of, "fake")
    for formatted in _formats(input):
        output, gradients = run(changed, formatted)
        expected, wanted = run(twin, formatted)
        difference = (output - expected).abs().max() / expected.abs().max()
        assert difference <= 1e-6
        # Where autograd follows, torch folds a tensor of four dimensions into a matrix before the
        # product, else it multiplies a batch of matrices, unless the tensor is contiguous.
        is_folded = name != "like an image" or formatted.is_contiguous()
        if forward == "auto" and _path(changed) == "codes" and is_folded:
            assert torch.equal(output, expected)
        for got, want in zip(gradients, wanted, strict=True):
            assert got is not None
            assert want is not None
            assert torch.equal(got, want)
        if name != "strided":  # which leaves a border unread
            assert clips == bool((gradients[0] == 0).any())


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda values: values.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every second": lambda values: values.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda values: values[:1].expand(values.shape),
}


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["matrix", "padded"])
def test_inputs_can_lie_in_memory_as_they_please(name: str, view: str, forward: str) -> None:
    layer, values = _case(name)
    changed = quantized(layer, values * 0.7, forward)
    found = []
    for contiguous in (False, True):
        leaf = values.clone().requires_grad_()
        input = VIEWS[view](leaf)
        output = changed(input.contiguous() if contiguous else input)
        weights = torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)
        found.append((output, *torch.autograd.grad((output * weights).sum(), leaf)))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["matrix", "padded"])
def test_an_input_of_another_width_is_refused(name: str, training: bool) -> None:
    layer, input = _case(name)
    changed = quantized(layer, input, "integer").train(training)
    expected = input.shape[1]
    with pytest.raises(QuantizationError, match=f"takes {expected} .* got {expected - 1}"):
        changed(input[:, 1:])


class NarrowObserver(MinMaxObserver):
    """Leaves the ends of a weight out of its range."""

    def compute_range(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        low, high = super().compute_range(tensor)
        return low * 0.5, high * 0.5


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize("name", ["matrix", "padded"])
def test_what_is_clipped_of_a_weight_has_no_gradient(name: str, forward: str) -> None:
    layer, input = _case(name)
    changed = quantized(layer, input, forward)
    own = changed.get_submodule("weight_quantizer")
    assert isinstance(own, ObservedFakeQuantizer)
    own.observer = NarrowObserver(own.scheme, own.site)
    _, gradients = run(changed, input)
    changed.product_options = ProductOptions("fake")
    _, wanted = run(changed, input)
    assert gradients[1] is not None
    assert wanted[1] is not None
    assert torch.equal(gradients[1], wanted[1])
    assert bool((gradients[1] == 0).any())


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize("name", ALL)
def test_outputs_can_be_changed_in_place(name: str, forward: str) -> None:
    layer, input = _case(name)
    changed = quantized(layer, input, forward)
    for formatted in _formats(input):
        found = []
        for activation in (torch.relu, torch.relu_):
            leaf = formatted.clone(memory_format=torch.preserve_format).requires_grad_()
            output = activation(changed(leaf))
            found.append((output, torch.autograd.grad(output.square().sum(), leaf)[0]))
        assert torch.equal(found[0][0], found[1][0])
        assert torch.equal(found[0][1], found[1][1])


def _path(layer: Any) -> str:
    decision = last_decision(layer.parts()[""])
    assert decision is not None
    return decision.path


@pytest.mark.parametrize("forward", PATHS)
@pytest.mark.parametrize(
    ("weight", "input"),
    [
        (QuantizationScheme(bits=8, symmetric=True), QuantizationScheme(bits=8, symmetric=False)),
        (QuantizationScheme(bits=4, symmetric=True, granularity="channel", axis=0), None),
        (QuantizationScheme(bits=8, symmetric=True, narrow_range=False), None),
        (None, QuantizationScheme(bits=6, symmetric=False, signed=False)),
        (None, QuantizationScheme(bits=8, symmetric=True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["matrix", "padded"])
def test_other_schemes(
    name: str, weight: QuantizationScheme | None, input: QuantizationScheme | None, forward: str
) -> None:
    schemes = {
        key: value for key, value in {"weight": weight, "input": input}.items() if value is not None
    }
    layer, values = _case(name)
    changed = quantized(layer, values * 0.7, forward, **schemes)
    twin = quantized(_case(name)[0], values * 0.7, "fake", **schemes)
    output, gradients = run(changed, values)
    expected, wanted = run(twin, values)
    assert _path(changed) in PATHS[forward]
    assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
    for got, want in zip(gradients, wanted, strict=True):
        assert got is not None
        assert want is not None
        assert torch.equal(got, want)


@pytest.mark.parametrize("forward", ["auto", "integer", "fake"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["matrix", "padded"])
def test_numbers_without_an_integer_are_those_of_fake_quantization(
    name: str, bad: float, forward: str
) -> None:
    layer, input = _case(name)
    changed = quantized(layer, input, forward)
    input.view(-1)[5] = bad
    with torch.no_grad():
        output = changed(input)
        changed.product_options = quantized(_case(name)[0], torch.ones(1), "fake").product_options
        expected = changed(input)
    assert torch.equal(output.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.allclose(output[finite], expected[finite], rtol=0, atol=1e-5)


def test_a_weight_that_is_not_a_number_spoils_its_own_channel() -> None:
    layer, input = _case("matrix")
    changed = quantized(layer, input, "integer")
    with torch.no_grad():
        layer.get_parameter("weight")[3, 2] = torch.nan
        output = changed(input)
    assert bool(output[:, 3].isnan().all())
    assert int(output.isnan().any(0).sum()) == 1


def test_differentiating_twice_is_refused_and_left_to_fake_quantization() -> None:
    layer, input = _case("matrix")
    leaf = input.requires_grad_()
    changed = quantized(layer, input.detach(), "auto")
    (gradient,) = torch.autograd.grad(changed(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(QuantizationError, match=r'use QATConfig\(forward="fake"\)'):
        gradient.sum().backward()
    changed.product_options = quantized(_case("matrix")[0], torch.ones(1), "fake").product_options
    (gradient,) = torch.autograd.grad(changed(leaf).square().sum(), leaf, create_graph=True)
    gradient.sum().backward()


def test_many_gradients_at_once_are_refused_and_left_to_fake_quantization() -> None:
    layer, input = _case("matrix")
    leaf = input.requires_grad_()
    changed = quantized(layer, input.detach(), "auto")

    def vectorized() -> None:
        output = changed(leaf)
        several = torch.stack([output, -output]).detach()
        torch.autograd.grad(output, leaf, several, is_grads_batched=True)

    with pytest.raises(QuantizationError, match=r'one at a time; use QATConfig\(forward="fake"\)'):
        vectorized()
    changed.product_options = quantized(_case("matrix")[0], torch.ones(1), "fake").product_options
    vectorized()


@pytest.mark.parametrize("case", ["matrix", "padded"])
def test_a_penalty_on_the_gradient_is_refused_where_the_output_is_what_is_differentiated(
    case: str,
) -> None:
    # The incoming gradient is a constant then; what comes back depends on the weight all the same.
    layer, input = _case(case)
    leaf = input.requires_grad_()
    changed = quantized(layer, input.detach(), "auto")
    (gradient,) = torch.autograd.grad(changed(leaf).sum(), leaf, create_graph=True)
    assert gradient.requires_grad
    with pytest.raises(QuantizationError, match=r'use QATConfig\(forward="fake"\)'):
        gradient.square().sum().backward()


def test_only_what_is_wanted_is_differentiated() -> None:
    layer, input = _case("padded")
    changed = quantized(layer, input, "auto")
    layer.get_parameter("weight").requires_grad_(False)
    changed(input).sum().backward()
    assert layer.get_parameter("weight").grad is None
    assert layer.get_parameter("bias").grad is not None


@pytest.mark.parametrize(
    ("backward", "name", "tolerance"),
    [
        ("bfloat16x3", "many", 1e-6),
        ("bfloat16x3", "padded", 1e-6),
        ("bfloat16", "many", 1e-2),
        ("bfloat16", "padded", 2e-2),
    ],
)
def test_error_of_bfloat16_gradients(
    backward: str,
    name: str,
    tolerance: float,
    monkeypatch: pytest.MonkeyPatch,
    each_passes: str,
) -> None:
    if (backward, name, each_passes) == ("bfloat16x3", "many", "torch"):
        pytest.skip("torch's bfloat16 products have bfloat16 results")
    layer, input = _case(name)
    changed = quantized(layer, input * 0.7)
    twin = quantized(_case(name)[0], input * 0.7, "fake").double()
    _, wanted = run(twin, input.double())
    # Whatever the machine: the rule would keep float32 without AMX.
    monkeypatch.setattr(layer_products, "backward_of", lambda *args: backward)
    _, gradients = run(changed, input)
    errors = [
        float((got.double() - want).abs().max() / want.abs().max())
        # The bias's gradient is a float32 sum in any case.
        for got, want in zip(gradients[:2], wanted[:2], strict=True)
        if got is not None and want is not None
    ]
    assert len(errors) == 2
    assert max(errors) <= tolerance
    if backward == "bfloat16":
        assert max(errors) > 1e-5

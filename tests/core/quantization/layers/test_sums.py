"""A quantized residual on integers: fake quantization's sum, and what it shares with the block."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizableAdd, QuantizationScheme
from compression_manager.quantization.integer.options import ProductOptions
from compression_manager.quantization.integer.selection import use_passes
from compression_manager.quantization.integer.torch_passes import TorchPasses
from compression_manager.quantization.layers import QuantizedLayer, Quantizers, quantize_parts
from integer_layers import INPUT, each_passes, quantized, quantizer
from quantization_reference import trained

pytestmark = pytest.mark.usefixtures("each_passes")
__all__ = ["each_passes"]

LAST = torch.channels_last


def _sum(
    range_of: Tensor, forward: Any = "auto", scheme: QuantizationScheme = INPUT
) -> QuantizedLayer:
    """Return the quantized sum of a residual with the range of `range_of`."""
    own = quantizer(scheme, "activation", range_of)
    layer = quantize_parts(QuantizableAdd(), {"residual": Quantizers(None, own)})
    layer.product_options = ProductOptions(forward)
    return layer


def _run(layer: Callable[..., Tensor], input: Tensor, residual: Tensor) -> list[Tensor]:
    """Return the output and both gradients of a fixed loss."""
    leaves = [
        item.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        for item in (input, residual)
    ]
    output = layer(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
    (output * weights).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _saved_bytes(layer: nn.Module, input: Tensor, residual: Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input, residual.requires_grad_())
    return sum(sizes.values())


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize(
    ("of_input", "of_residual"),
    [(None, None), (LAST, LAST), (None, LAST), (LAST, None)],
    ids=["contiguous", "channels_last", "residual channels_last", "input channels_last"],
)
@pytest.mark.parametrize(
    "scheme", [INPUT, QuantizationScheme(bits=8), QuantizationScheme(bits=4)], ids=str
)
def test_values_and_gradients_are_those_of_fake_quantization(
    scheme: QuantizationScheme, of_input: Any, of_residual: Any, clips: bool
) -> None:
    torch.manual_seed(0)
    input, residual = torch.randn(2, 2, 3, 5, 7)
    input = input if of_input is None else input.contiguous(memory_format=of_input)
    residual = residual if of_residual is None else residual.contiguous(memory_format=of_residual)
    range_of = residual * (0.5 if clips else 1.0)
    found = _run(_sum(range_of, scheme=scheme), input, residual)
    wanted = _run(_sum(range_of, "fake", scheme), input, residual)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
    assert found[0].stride() == (input + residual).stride()
    assert clips == bool((found[2] == 0).any())


def test_only_bits_of_clipped_elements_are_kept() -> None:
    torch.manual_seed(0)
    input, residual = torch.randn(2, 64, 64)
    assert _saved_bytes(_sum(residual), input, residual) == 0
    assert _saved_bytes(_sum(residual * 0.5), input, residual) == 64 * 64 // 8


@pytest.mark.parametrize(
    ("input", "residual"),
    [
        (torch.randn(2, 3, 4), torch.randn(3, 4)),
        (torch.randn(4), torch.randn(2, 3, 4)),
        (torch.randn(4, 6).t(), torch.randn(6, 4)),
        (torch.randn(6, 4), torch.randn(4, 6).t()),
        (torch.randn(6, 8)[:, ::2], torch.randn(6, 4)),
        (torch.randn(6, 4), torch.randn(6, 8)[:, ::2]),
        (torch.randn(6, 4), torch.randn(4).expand(6, 4)),
        (torch.randn(3, 4).double(), torch.randn(3, 4).double()),
        (torch.randn(3, 4).bfloat16(), torch.randn(3, 4)),
        (torch.randn(3, 4), torch.randn(3, 4).half()),
        (torch.randn(0, 4), torch.randn(0, 4)),
        (torch.randn(()), torch.randn(())),
        (torch.randn(3), torch.tensor([1.0, torch.nan, -torch.inf])),
    ],
    ids=[
        "broadcast residual", "broadcast input", "transposed input", "transposed residual",
        "input with gaps", "residual with gaps", "expanded residual",
        "float64", "bfloat16 input", "float16 residual", "empty", "scalar", "not finite",
    ],
)  # fmt: skip
def test_other_operands(input: Tensor, residual: Tensor) -> None:
    range_of = torch.linspace(-1, 1, 9)
    found = _run(_sum(range_of), input, residual)
    wanted = _run(_sum(range_of, "fake"), input, residual)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_result_can_be_changed_in_place() -> None:
    torch.manual_seed(0)
    input, residual = torch.randn(2, 6, 8)
    layer, found = _sum(residual), []
    for activation in (torch.relu, torch.relu_):
        leaf = residual.clone().requires_grad_()
        output = activation(layer(input, leaf))
        found += [output.detach(), *torch.autograd.grad(output.square().sum(), leaf)]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.add = QuantizableAdd()

    def forward(self, images: Tensor) -> Tensor:
        images = images.relu()
        hidden = self.bn2(self.conv2(self.bn1(self.conv1(images)).relu()))
        return self.add(hidden, images).relu()


def _trained(**options: Any) -> tuple[Any, nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(8, 4, 6, 6)
    model = nn.Sequential(_Block(), _Block())
    return trained(model, images, **options), model, images


def test_a_residual_has_the_range_of_the_layer_that_reads_it() -> None:
    manager, model, _ = _trained()
    for block in model:
        residual, read = block.add.residual_input_quantizer, block.conv1.input_quantizer
        assert torch.equal(residual.scale, read.scale)
        assert torch.equal(residual.zero_point, read.zero_point)
    manager.close()


class _Counting(TorchPasses):
    def __init__(self) -> None:
        self.count = 0

    def quantize(self, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        self.count += 1
        return super().quantize(*args, **options)


class _Refusing(TorchPasses):
    def add_dequantized(self, *args: Any, **options: Any) -> Tensor:
        raise AssertionError("no integers are to be added")


def test_a_residual_is_quantized_once_for_its_layer_and_the_sum() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 6, 6)
    layer, total = quantized(nn.Conv2d(4, 4, 3, padding=1), images, "integer"), _sum(images)
    images = images.requires_grad_() * 1.0  # a result of the model, which layers share
    counting = _Counting()
    with use_passes(counting):
        total(layer(images), images)
    assert counting.count == 1


def test_a_block_quantizes_its_input_once_in_training() -> None:
    manager, model, images = _trained()
    counting = _Counting()
    with use_passes(counting):
        model(images)
    # Inputs of four convolutions, and the images once more, which might change unseen.
    assert counting.count == 5
    manager.close()


def test_a_converted_sum_is_the_trained_one_to_the_last_bit() -> None:
    manager, model, images = _trained()
    converted = manager.convert(images)
    hidden = torch.randn(images.shape)
    with torch.no_grad():
        expected = model.eval()[0].add(hidden, images)
        assert torch.equal(converted[0].add(hidden, images), expected)
        with use_passes(_Refusing()):  # the one without integers
            assert torch.equal(converted[0].add(hidden.double(), images).float(), expected)
    manager.close()


def test_a_residual_that_was_changed_in_place_is_quantized_anew() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 4, 6, 6)
    layer, total = quantized(nn.Conv2d(4, 4, 3, padding=1), images, "integer"), _sum(images)
    hidden = layer(images)
    images.mul_(0.5)
    assert torch.equal(total(hidden, images), _sum(images * 2)(hidden, images.clone()))


def test_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    input, residual = torch.randn(2, 3, 8)
    layer = _sum(residual * 0.5)

    def repeated(*operands: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(layer, *operands, use_reentrant=False))

    for got, want in zip(
        _run(repeated, input, residual), _run(layer, input, residual), strict=True
    ):
        assert torch.equal(got, want)


def test_one_tensor_can_be_both_operands() -> None:
    values = torch.linspace(-1, 1, 24).requires_grad_()
    total = _sum(values.detach() * 0.5)(values, values)
    total.sum().backward()
    assert values.grad is not None
    assert set(values.grad.tolist()) == {1.0, 2.0}


def test_a_residual_without_gradient_costs_none() -> None:
    input, residual = torch.randn(4, requires_grad=True), torch.randn(4)
    _sum(residual * 0.5)(input, residual).sum().backward()
    assert input.grad is not None
    assert torch.equal(input.grad, torch.ones(4))


def test_differentiating_twice_is_refused() -> None:
    input, residual = torch.randn(2, 4)
    leaf = residual.requires_grad_()
    total = _sum(residual.detach())(input, leaf)
    (gradient,) = torch.autograd.grad(total.square().sum(), leaf, create_graph=True)
    with pytest.raises(QuantizationError, match=r'use QATConfig\(forward="fake"\)'):
        gradient.sum().backward()


def test_a_gradient_that_no_number_changes_can_be_part_of_a_loss() -> None:
    input, residual = torch.randn(2, 4)
    layer, leaf = _sum(residual * 0.5), residual.requires_grad_()
    (gradient,) = torch.autograd.grad(layer(input, leaf).sum(), leaf, create_graph=True)
    (gradient.square().sum() + leaf.sum()).backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, torch.ones(4))


def test_autocast_is_left_to_fake_quantization() -> None:
    torch.manual_seed(0)
    input, residual = torch.randn(2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = _run(_sum(residual * 0.5), input.bfloat16(), residual)
        wanted = _run(_sum(residual * 0.5, "fake"), input.bfloat16(), residual)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)


def test_the_report_says_how_sums_are_computed() -> None:
    manager, model, images = _trained()
    rows = {row.name: row.arithmetic for row in manager.report().layers}
    assert str(rows["0.add"]) == "sums with the real numbers of integers"
    with torch.no_grad():
        model[1].add(images.double(), images)
    found = {row.name: row.arithmetic for row in manager.report().layers}["1.add"]
    assert found is not None
    assert found.training == "sums with fake-quantized numbers"
    assert found.evaluation == "sums with the real numbers of integers"
    assert found.reasons == ["it computes in torch.float64"]
    assert found.kernel == ""
    manager.close()


@pytest.mark.parametrize("forward", ["auto", "fake"])
def test_what_is_trained_is_what_is_converted(forward: Any) -> None:
    manager, model, images = _trained(forward=forward)
    converted = manager.convert(images)
    model.eval()
    with torch.no_grad():
        expected, actual = model(images), converted(images)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    twin = copy.deepcopy(converted)
    leaf = images.clone().requires_grad_()
    twin(leaf).sum().backward()  # through the formulas, where gradients are wanted
    assert leaf.grad is not None
    torch.testing.assert_close(twin(leaf).detach(), actual, rtol=1e-5, atol=1e-5)
    manager.close()

"""A converted model in the operators that Inductor knows: the same outputs, int8 where possible."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compression_manager import deploy
from compression_manager.integrations.inductor import int8_kernels_are_exact
from compression_manager.integrations.inductor_graph import to_inductor_operators
from compression_manager.quantization import QuantizableAdd, QuantizationScheme
from compression_manager.quantization.integer.selection import reference_arithmetic
from compression_manager.tracing.program import trace
from quantization_reference import trained


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def translated(
    model: nn.Module, inputs: Any, **options: Any
) -> tuple[nn.Module, Any, int, Counter[str]]:
    """The converted model, its translation, its int8 weights, and how often operators occur."""
    torch.manual_seed(0)
    converted = trained(model, inputs, **options).convert()
    module, weights = to_inductor_operators(trace(converted, inputs, view="eight bits"))
    names = [str(node.target).partition(".")[2] for node in module.graph.nodes]
    return converted, module, weights, Counter(names)


def assert_same(converted: nn.Module, module: Any, inputs: Tensor) -> None:
    """Bit for bit: the operators compute the same formula in the same order."""
    with torch.no_grad(), reference_arithmetic():
        assert torch.equal(module(inputs), converted(inputs))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, padding="same", groups=4)
        self.last = nn.Conv2d(4, 3, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(self.depthwise(self.first(input).relu()).relu())


def test_linear_layers_become_quantized_decomposed_operators() -> None:
    converted, module, weights, operators = translated(
        nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), randn(5, 6)
    )
    assert weights == 2
    assert operators["quantize_per_tensor.default"] == 2
    assert operators["dequantize_per_tensor.default"] == 2
    assert operators["dequantize_per_channel.default"] == 2
    assert not any(name.startswith("fake_quantize") for name in operators)
    for size in (1, 5, 9):
        assert_same(converted, module, randn(size, 6))


def test_scale_and_zero_point_of_inputs_are_numbers() -> None:
    converted, module, *_ = translated(nn.Sequential(nn.Linear(6, 4)), randn(5, 6))
    layer = converted.get_submodule("0")
    namespace = torch.ops.quantized_decomposed
    (node,) = module.graph.find_nodes(
        op="call_function", target=namespace.quantize_per_tensor.default
    )
    assert isinstance(layer, deploy.ConvertedLinear)
    expected = (float(layer.input_scale), int(layer.input_zero_point), 0, 255, torch.uint8)
    assert node.args[1:] == expected


def test_convolutions_over_one_channel_stay_in_float32() -> None:
    converted, module, weights, _ = translated(Convolutions(), randn(3, 1, 12, 12))
    assert weights == 2
    assert_same(converted, module, randn(4, 1, 12, 12))


def test_one_scale_for_a_weight_is_repeated_for_its_channels() -> None:
    converted, module, weights, operators = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), weight=QuantizationScheme(8)
    )
    assert (weights, operators["dequantize_per_channel.default"]) == (1, 1)
    assert_same(converted, module, randn(2, 6))


@pytest.mark.parametrize("dynamic", [False, True])
def test_signed_inputs_become_unsigned(dynamic: bool) -> None:
    signed = QuantizationScheme(8, symmetric=False, dynamic=dynamic)
    converted, module, weights, _ = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), activation=signed
    )
    assert weights == 1
    kinds = {node.args[-1] for node in module.graph.nodes if "quantize_per_tensor" in node.name}
    assert kinds == {torch.uint8}
    assert_same(converted, module, 3 * randn(7, 6))


def test_an_input_with_its_own_range_has_a_tensor_for_a_scale() -> None:
    dynamic = QuantizationScheme(8, symmetric=False, signed=False, dynamic=True)
    converted, module, weights, operators = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), activation=dynamic
    )
    assert (weights, operators["quantize_per_tensor.tensor"]) == (1, 1)
    assert_same(converted, module, randn(2, 6))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_narrow_range_is_clipped_before_the_kernel(signed: bool, dynamic: bool) -> None:
    # From -127 to 127, where kernels clip at -128, or from 1 to 255.
    scheme = QuantizationScheme(8, signed=signed, dynamic=dynamic)
    converted, module, weights, operators = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), activation=scheme
    )
    overload = "tensor" if dynamic else "default"
    assert (weights, operators[f"quantize_per_tensor.{overload}"]) == (1, 1)
    for factor in (0.5, 1.0, 100.0):
        assert_same(converted, module, factor * randn(200, 6))
    edges = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1e-30, -1e30]).expand(2, 6)
    if not dynamic:
        assert_same(converted, module, edges)


@pytest.mark.timeout(60)
def test_ranges_of_inputs_behind_many_layers_are_translated_in_one_pass() -> None:
    # Looking back from each range to all that it depends on took twice as long with each layer.
    scheme = QuantizationScheme(symmetric=False, signed=False, dynamic=True)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(12)))
    converted, module, weights, _ = translated(model, randn(5, 6), activation=scheme)
    assert weights == 12
    assert_same(converted, module, randn(5, 6))


@pytest.mark.parametrize(
    "options",
    [
        {"weight": QuantizationScheme(4, granularity="channel")},
        {"weight": QuantizationScheme(8, symmetric=False, granularity="channel")},
        {"weight": QuantizationScheme(8, granularity="group", group_size=3)},
    ],
    ids=["4 bits", "affine", "groups"],
)
def test_weights_that_no_kernel_takes_stay_formulas(options: dict[str, Any]) -> None:
    converted, module, weights, operators = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), **options
    )
    assert (weights, operators["dequantize_per_channel.default"]) == (0, 0)
    assert_same(converted, module, randn(2, 6))


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(4, symmetric=False, signed=False),
        QuantizationScheme(8, False, "token", dynamic=True),
    ],
    ids=str,
)
def test_inputs_that_no_kernel_clips_stay_formulas(scheme: QuantizationScheme) -> None:
    converted, module, _, operators = translated(
        nn.Sequential(nn.Linear(6, 4)), randn(5, 6), activation=scheme
    )
    assert not any(name.startswith("quantize_per_tensor") for name in operators)
    assert_same(converted, module, randn(2, 6))


def test_rows_of_an_embedding_are_dequantized_after_they_are_chosen() -> None:
    indices = torch.randint(20, (5, 3), generator=torch.Generator().manual_seed(0))

    class Bag(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(20, 6)
            self.head = nn.Linear(6, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.table(tokens).mean(1))

    converted, module, weights, _ = translated(Bag(), indices)
    assert weights == 1  # the head's
    assert_same(converted, module, indices[:2])


def test_rows_of_a_table_with_constant_indices_are_no_weight_of_a_layer() -> None:
    class WithPositions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Embedding(5, 6)
            self.head = nn.Linear(6, 4)
            self.register_buffer("order", torch.arange(5)[None])

        def forward(self, input: Tensor) -> Tensor:
            return self.head(input + self.positions(self.order))

    inputs = randn(3, 5, 6)
    converted, module, weights, _ = translated(WithPositions(), inputs)
    assert weights == 1  # the head's
    assert_same(converted, module, inputs)


class Sums(nn.Module):
    """Linear layers whose results are added to other tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.constant = nn.Parameter(randn(1, 6))

    def forward(self, input: Tensor) -> Tensor:
        hidden = input + self.first(input)
        changed = self.second(hidden) + hidden
        changed += input.reshape(-1, 2, 3).reshape(-1, 6)
        return self.constant + changed + 1.0 + torch.add(changed, input, alpha=2)


def test_nothing_is_added_to_inputs_and_constants_in_place() -> None:
    inputs = randn(5, 6)
    converted, module, weights, operators = translated(Sums(), inputs)
    assert weights == 2
    # The input twice, once in another shape, and the constant.
    assert operators["neg.default"] == 3
    assert (operators["sub.Tensor"], operators["sub_.Tensor"]) == (2, 1)
    # What the layers themselves return may be written to.
    assert operators["add.Tensor"] == 4
    assert_same(converted, module, inputs)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_inputs_that_are_no_floats_are_added_as_they_are(dtype: torch.dtype) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, input: Tensor, mask: Tensor) -> Tensor:
            total = self.layer(input) + mask + (input + mask) + input.shape[0]
            input = input * 1.0
            input += mask
            return total + input

    inputs = randn(5, 6), torch.arange(30).reshape(5, 6).to(dtype)
    converted, module, weights, operators = translated(Masked(), inputs)
    assert weights == 1
    assert operators["neg.default"] == 0
    with torch.no_grad(), reference_arithmetic():
        assert torch.equal(module(*inputs), converted(*inputs))


class Block(nn.Module):
    """Adds its input, or a constant, to the result of a layer, each quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.add, self.shift = QuantizableAdd(), QuantizableAdd()
        constant = randn(1, 4, 5, 5).to(memory_format=torch.channels_last)
        self.constant = nn.Parameter(constant)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.add(self.first(input), input).relu()
        return self.shift(self.second(hidden), self.constant)


def test_a_residual_of_an_activation_is_not_fused() -> None:
    class Darknet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
            self.add, self.plain = QuantizableAdd(), QuantizableAdd()

        def forward(self, input: Tensor) -> Tensor:
            hidden = self.first(input).relu()
            return self.plain(self.second(self.add(hidden, input)), hidden)

    inputs = randn(3, 4, 5, 5)
    converted, module, weights, operators = translated(Darknet(), inputs)
    assert weights == 2
    # The other sum is that of a layer's own output.
    assert (operators["add.Tensor"], operators["sub.Tensor"]) == (1, 1)
    assert_same(converted, module, inputs)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU(), nn.ReLU(inplace=True)])
def test_a_sum_with_an_activated_layer_is_not_fused(activation: nn.Module) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
            self.activation = activation

        def forward(self, input: Tensor) -> Tensor:
            hidden: Tensor = self.activation(self.first(input)) + self.second(input)
            # Read by a layer as well, what an activation returned is no part of the layer before.
            again = self.activation(self.second(hidden))
            return again + self.first(again)

    inputs = randn(3, 6)
    converted, module, _, operators = translated(Gated(), inputs)
    assert (operators["add.Tensor"], operators["sub.Tensor"]) == (1, 1)
    assert_same(converted, module, inputs)


class Turned(nn.Module):
    """A linear layer over a transposed tensor, and one over a contiguous one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 4)

    def forward(self, input: Tensor) -> Tensor:
        return self.second(self.first(input.transpose(1, 2)))


def test_a_transposed_input_of_a_linear_layer_is_made_contiguous() -> None:
    inputs = randn(3, 6, 5)
    converted, module, weights, operators = translated(Turned(), inputs)
    assert weights == 2
    assert operators["clone.default"] == 1
    assert_same(converted, module, inputs)


def test_a_residual_is_quantized_as_the_layer_that_reads_it() -> None:
    inputs = randn(3, 4, 5, 5)
    converted, module, weights, operators = translated(Block(), inputs)
    assert weights == 2
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    calls = Counter(node.args for node in module.graph.nodes if node.target is quantize)
    # That of the input occurs twice, which compilers merge.
    assert sorted(calls.values()) == [1, 1, 2]
    # Inductor writes the sum to the 8-bit residual; that of a constant is one itself.
    assert (operators["add.Tensor"], operators["sub.Tensor"], operators["neg.default"]) == (1, 1, 1)
    assert_same(converted, module, inputs)


def test_the_probe_says_whether_products_of_8_bits_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    input = torch.randint(0, 256, (32, 96), dtype=torch.uint8, generator=generator)
    weight = torch.randint(-127, 128, (24, 96), dtype=torch.int8, generator=generator)
    product = torch.ops.onednn.qlinear_pointwise(
        *(input, 1.0, 0, torch.ops.onednn.qlinear_prepack(weight, None)),
        *(torch.ones(24), torch.zeros(24, dtype=torch.int64)),
        *(None, 1.0, 0, torch.float32, "none", [], ""),
    )
    expected = input.long() @ weight.long().t()
    assert torch.equal(product.long(), expected) == int8_kernels_are_exact()


@pytest.mark.parametrize(
    ("first", "is_float"),
    [
        (nn.Conv2d(4, 4, 3, padding=3), True),
        (nn.Conv2d(4, 4, 3, padding=1), False),
        (nn.Conv2d(4, 4, 3, padding="valid"), False),
        (nn.Conv2d(4, 4, (11, 1), padding="same", groups=4), True),
        (nn.Conv2d(4, 4, (11, 1), padding="same"), False),
        (nn.Conv2d(4, 4, (1, 4), padding="same", dilation=2, groups=4), False),
    ],
)
def test_convolutions_that_read_padding_only_stay_in_float32(
    first: nn.Conv2d, is_float: bool
) -> None:
    inputs = randn(3, 4, 5, 5)
    model = nn.Sequential(first, nn.Conv2d(4, 3, 1))
    converted, module, weights, _ = translated(model, inputs)
    assert weights == 2 - is_float
    assert_same(converted, module, inputs)

"""Products of activations as modules: torch's functions, then on numpy's operands."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compression_manager import deploy
from compression_manager.quantization import (
    QuantizableAdd,
    QuantizableAttention,
    QuantizableMatmul,
    QuantizationScheme,
)
from compression_plugins.fake_quant import LayerRule
from layer_reference import quantized, quantized_input
from quantization_reference import prepared, trained


def leaves(count, *shape):
    torch.manual_seed(0)
    return [torch.randn(shape, requires_grad=True) for _ in range(count)]


def compare(layer, operation, tensors, **options):
    """The layer on quantized operands against the operation on numpy's, gradients included."""
    values = [quantized_input(tensor) for tensor in tensors]
    operands = [value.requires_grad_() for value, _ in values]
    expected = operation(*operands, **options)
    expected.sin().sum().backward()
    output = quantized(layer)(*tensors, **options)
    torch.testing.assert_close(output, expected)
    output.sin().sum().backward()
    for tensor, operand, (_, passes) in zip(tensors, operands, values, strict=True):
        torch.testing.assert_close(tensor.grad, operand.grad * passes)


def test_matmul_quantizes_both_operands():
    left, right = leaves(2, 2, 3, 3)
    assert torch.equal(QuantizableMatmul()(left, right), left @ right)
    compare(QuantizableMatmul(), torch.matmul, [left, right])


@pytest.mark.parametrize("shape", [(2, 3, 3), (1, 3)])
def test_a_sum_quantizes_its_residual_alone(shape):
    (input,), (residual,) = leaves(1, 2, 3, 3), leaves(1, *shape)
    assert torch.equal(QuantizableAdd()(input, residual), input + residual)
    values, passes = quantized_input(residual)
    operand = values.requires_grad_()
    expected = input + operand
    weights = torch.linspace(-1, 1, 18).reshape(2, 3, 3)
    output = quantized(QuantizableAdd())(input, residual)
    assert torch.equal(output, expected)
    (expected * weights).sum().backward()
    (output * weights).sum().backward()
    assert torch.equal(residual.grad, operand.grad * passes)
    assert torch.equal(input.grad, 2 * weights)  # of both sums


OPTIONS = [
    {},
    {"is_causal": True, "scale": 0.2},
    {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "causal", "masked"])
def test_attention_quantizes_query_key_and_value(options):
    tensors = leaves(3, 2, 2, 5, 4)
    expected = F.scaled_dot_product_attention(*tensors, **options)
    assert torch.equal(QuantizableAttention()(*tensors, **options), expected)
    compare(QuantizableAttention(), F.scaled_dot_product_attention, tensors, **options)


@pytest.mark.parametrize("on", [False, True])
def test_attention_drops_the_weights_that_torch_would(on):
    tensors = leaves(3, 2, 2, 5, 4)
    operands = [quantized_input(item)[0] if on else item for item in tensors]
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(*operands, dropout_p=0.5)
    layer = quantized(QuantizableAttention()) if on else QuantizableAttention()
    torch.manual_seed(1)
    torch.testing.assert_close(layer(*tensors, dropout_p=0.5), expected)


def test_attention_with_fewer_heads_of_keys():
    query = torch.randn(2, 4, 5, 4)
    key, value = torch.randn(2, 2, 2, 5, 4)
    expected = F.scaled_dot_product_attention(
        *(quantized_input(item)[0] for item in (query, key, value)), enable_gqa=True
    )
    output = quantized(QuantizableAttention())(query, key, value, enable_gqa=True)
    torch.testing.assert_close(output, expected)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(6, 6)
        self.product = QuantizableMatmul()

    def forward(self, input):
        return self.product(self.embed(input), input)


INPUT = torch.randn(2, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_that_is_loaded_keeps_the_ranges(dynamic, tmp_path):
    scheme = QuantizationScheme(symmetric=False, signed=False, dynamic=dynamic)
    manager = trained(Product(), INPUT, activation=scheme)
    detail = {row.name: row.detail for row in manager.report().layers}["product"]
    assert detail == f"weight none, input {scheme}"
    converted = manager.convert()
    manager.save_converted(tmp_path / "int8")
    loaded = deploy.load(tmp_path / "int8", Product())
    assert torch.equal(loaded(INPUT), converted(INPUT))
    stored = [name for name in loaded.state_dict() if name.startswith("product.")]
    assert stored == ([] if dynamic else [
        "product.left.input_scale", "product.left.input_zero_point",
        "product.right.input_scale", "product.right.input_zero_point",
    ])  # fmt: skip


@pytest.mark.parametrize("rule", [LayerRule("product", weight_only=True), None])
def test_without_a_scheme_for_inputs_nothing_is_left_to_quantize(rule):
    options = {"activation": None} if rule is None else {"overrides": (rule,)}
    model = Product()
    manager = prepared(model, **options)
    assert type(model.product) is QuantizableMatmul
    row = {layer.name: layer for layer in manager.report().layers}["product"]
    assert not row.quantized
    assert row.bytes_before == 0
    assert "no weight, and its inputs" in row.detail
    manager.close()

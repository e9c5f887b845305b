"""MultiheadAttention: torch's own without quantizing, numpy's operands with it."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization import QuantizationScheme
from layer_reference import quantized, quantized_input, quantized_weight

LENGTH, KEYS, BATCH, WIDTH, HEADS = 4, 5, 3, 8, 2


def attention(*, widths=False, **options):
    torch.manual_seed(0)
    extra = {"kdim": 6, "vdim": 10} if widths else {}
    layer = nn.MultiheadAttention(WIDTH, HEADS, **options, **extra)
    for parameter in layer.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)
    return layer


def inputs(layer, *, batched=True, dtype=torch.float32):
    torch.manual_seed(1)
    made = []
    for length, width in ((LENGTH, WIDTH), (KEYS, layer.kdim), (KEYS, layer.vdim)):
        shape = [length, BATCH, width] if batched else [length, width]
        if batched and layer.batch_first:
            shape[:2] = BATCH, length
        made.append(torch.randn(shape, dtype=dtype, requires_grad=True))
    return made


def masks(kind, padded, *, batched, dtype):
    torch.manual_seed(2)
    padding = torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[0, 3:] = padding[2, :1] = True
    padding = (padding if batched else padding[0]) if padded else None
    batch = BATCH if batched else 1
    made = {
        "none": None,
        "bool": torch.rand(LENGTH, KEYS) > 0.7,
        "float": torch.randn(LENGTH, KEYS, dtype=dtype),
        "bool of each head": torch.rand(batch * HEADS, LENGTH, KEYS) > 0.7,
        "float of each head": torch.randn(batch * HEADS, LENGTH, KEYS, dtype=dtype),
    }[kind]
    if made is not None and made.dtype == torch.bool:
        made[..., 1] = False
        if padding is not None:
            padding[..., 1] = False
    elif made is not None and padding is not None:
        padding = torch.zeros(padding.shape, dtype=dtype).masked_fill_(padding, -math.inf)
    return made, padding


def outcome(layer, tensors, **arguments):
    """Output, weights and all gradients."""
    output, weights = layer(*tensors, **arguments)
    total = output.sin().sum()
    if weights is not None:
        total = total + weights.cos().sum()
    leaves = [*tensors, *(p for p in layer.parameters() if p.requires_grad)]
    gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    return output, weights, gradients


MASKS = ["none", "bool", "float", "bool of each head", "float of each head"]


@settings(max_examples=60, deadline=None)
@given(
    widths=st.booleans(),
    bias=st.booleans(),
    add_bias_kv=st.booleans(),
    add_zero_attn=st.booleans(),
    batch_first=st.booleans(),
    batched=st.booleans(),
    mask=st.sampled_from(MASKS),
    padded=st.booleans(),
    need_weights=st.booleans(),
    average=st.booleans(),
    training=st.booleans(),
)
def test_without_quantizing_it_is_torch_s_own_in_float64(
    widths, bias, add_bias_kv, add_zero_attn, batch_first, batched, mask, padded, need_weights,
    average, training,
):  # fmt: skip
    layer = attention(
        widths=widths, bias=bias, add_bias_kv=add_bias_kv, add_zero_attn=add_zero_attn,
        batch_first=batch_first, dropout=0.3, dtype=torch.float64,
    )  # fmt: skip
    layer.train(training)
    tensors = inputs(layer, batched=batched, dtype=torch.float64)
    attn_mask, padding = masks(mask, padded, batched=batched, dtype=torch.float64)
    arguments = {
        "key_padding_mask": padding, "attn_mask": attn_mask,
        "need_weights": need_weights, "average_attn_weights": average,
    }  # fmt: skip
    torch.manual_seed(3)
    expected = outcome(layer, tensors, **arguments)
    layer = quantized(layer, on=False)
    torch.manual_seed(3)
    actual = outcome(layer, tensors, **arguments)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-12)
    assert actual[0].shape == expected[0].shape
    if need_weights:
        torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-12)
    else:
        assert actual[1] is expected[1] is None
    for got, wanted in zip(actual[2], expected[2], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("chosen", [(0, 0, 1), (0, 1, 1), (0, 1, 0)])
def test_two_of_the_three_inputs_can_be_one_tensor(chosen):
    layer = attention(dtype=torch.float64)
    tensors = torch.randn(2, LENGTH, BATCH, WIDTH, dtype=torch.float64).unbind()
    tensors = [tensors[index] for index in chosen]
    expected, _ = layer(*tensors)
    actual, _ = quantized(layer, on=False)(*tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_the_causal_hint_means_what_it_does_in_torch(padded, need_weights):
    layer = attention(dtype=torch.float64)
    input = torch.randn(KEYS, BATCH, WIDTH, dtype=torch.float64)
    _, padding = masks("none", padded, batched=True, dtype=torch.float64)
    if padding is not None:
        padding[:, 0] = False
    arguments = {
        "key_padding_mask": padding, "is_causal": True, "need_weights": need_weights,
        "attn_mask": torch.ones(KEYS, KEYS, dtype=torch.bool).triu(1),
    }  # fmt: skip
    expected = layer(input, input, input, **arguments)
    actual = quantized(layer, on=False)(input, input, input, **arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    # The causal mask was in force.
    free = layer(input, input, input, key_padding_mask=padding)[0]
    assert not torch.allclose(free, expected[0])
    with pytest.raises(QuantizationError, match="attn_mask, which is missing"):
        layer(input, input, input, is_causal=True)


def reference(layer, tensors):
    """Written out head by head on quantized operands; needs widths of its own for each input."""
    if layer.in_proj_weight is None:
        weights = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight]
    else:
        weights = layer.in_proj_weight.chunk(3)
    q, k, v = (
        F.linear(quantized_input(x)[0], quantized_weight(w)[0], b)
        for x, w, b in zip(tensors, weights, layer.in_proj_bias.chunk(3), strict=True)
    )
    size = WIDTH // HEADS
    result = torch.empty(LENGTH, BATCH, WIDTH)
    for item, head in itertools.product(range(BATCH), range(HEADS)):
        columns = slice(head * size, (head + 1) * size)
        scores = q[:, item, columns] @ k[:, item, columns].T / math.sqrt(size)
        result[:, item, columns] = scores.softmax(-1) @ v[:, item, columns]
    output = layer.out_proj
    return F.linear(quantized_input(result)[0], quantized_weight(output.weight)[0], output.bias)


@pytest.mark.parametrize("widths", [False, True])
def test_the_four_projections_compute_on_quantized_operands(widths):
    layer = attention(widths=widths)
    tensors = inputs(layer)
    with torch.no_grad():
        expected = reference(layer, tensors)
        exact, _ = layer(*tensors)
        quantized(layer.out_proj)
        output, _ = quantized(layer)(*tensors)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(output, exact, rtol=1e-4, atol=1e-4)
    output, _ = layer(*tensors)
    output.sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
    assert all(tensor.grad is not None for tensor in tensors)


def test_each_projection_has_a_scale_of_its_own_per_tensor():
    layer = attention()
    with torch.no_grad():
        layer.in_proj_weight[:WIDTH] *= 100
    quantized(layer, scheme=QuantizationScheme())
    scales = [
        float(part.weight_quantizer.quantization_parameters(part.weight).scale)
        for part in layer.parts().values()
    ]
    largest = [float(weight.detach().abs().max()) for weight in layer.in_proj_weight.chunk(3)]
    assert scales == pytest.approx([value / 127 for value in largest])


@pytest.mark.parametrize("gradients", [False, True])
def test_evaluation_never_takes_the_fused_path(gradients):
    layer = attention(batch_first=True)
    input = torch.randn(BATCH, LENGTH, WIDTH)
    exact, _ = layer.eval()(input, input, input)
    quantized(layer).train()(input, input, input)
    layer.eval()
    with torch.set_grad_enabled(gradients):
        output, _ = layer(input, input, input, need_weights=False)
    expected, _ = copy.deepcopy(layer).train()(input, input, input)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attn_mask": torch.zeros(LENGTH, LENGTH)}, r"attn_mask .* shape \(4, 4\), expected"),
        ({"attn_mask": torch.zeros(1, LENGTH, KEYS)}, r"expected \(6, 4, 5\)"),
        ({"attn_mask": torch.zeros(LENGTH, KEYS, dtype=torch.int64)}, "bool or float, got"),
        ({"key_padding_mask": torch.zeros(1, KEYS)}, r"key_padding_mask .* expected \(3, 5\)"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(arguments, message):
    layer = attention()
    tensors = inputs(layer)
    with pytest.raises(QuantizationError, match=message):
        quantized(layer)(*tensors, **arguments)


def test_nested_tensors_are_refused():
    layer = quantized(attention(batch_first=True))
    nested = torch.nested.nested_tensor([torch.randn(2, WIDTH)], layout=torch.jagged)
    with pytest.raises(QuantizationError, match="no nested tensors"):
        layer(nested, nested, nested)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_quantizers_see_the_layout_of_the_caller(batch_first, batched):
    """Learned scales count the values of one sample, which dimension 0 tells apart."""
    layer = quantized(attention(batch_first=batch_first))
    seen = []
    readers = [layer.get_submodule(f"{part}_input_quantizer") for part in ("query", "key", "value")]
    for module in (*readers, layer.out_proj):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    tensors = inputs(layer, batched=batched)
    layer(*tensors)
    assert seen == [*(tensor.shape for tensor in tensors), tensors[0].shape]

"""The straight-through gradient, what backward keeps, torch.compile and autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from compression_manager.quantization import dequantize, fake_quantize, quantize

SCALE = torch.tensor([0.1, 0.25, 0.02])
ZERO_POINT = torch.tensor([3, 128, 250], dtype=torch.int32)


def sample(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(16, 3, 5, generator=generator) * 20).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_passes_in_range_and_is_exactly_zero_where_clipped(dtype):
    x = sample(dtype)
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1).backward(incoming)
    shaped = (SCALE.reshape(3, 1).double(), ZERO_POINT.reshape(3, 1).double())
    code = torch.round(x.detach().double() / shaped[0]) + shaped[1]
    inside = (code >= 0) & (code <= 255)
    assert 0.1 < inside.float().mean() < 0.9
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(inside, incoming, 0.0))


def test_gradient_may_pass_everywhere():
    x = sample()
    incoming = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    output = fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1, pass_clipped_gradient=True)
    assert torch.equal(output, fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1))
    output.backward(incoming)
    assert x.grad is not None
    assert torch.equal(x.grad, incoming)


def test_equals_the_gradient_of_torch_fused_operator():
    x = sample()
    fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1).square().sum().backward()
    twin = sample()
    fused = torch.fake_quantize_per_channel_affine(twin, SCALE, ZERO_POINT, 1, 0, 255)
    fused.square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)


@settings(deadline=None, max_examples=100)
@given(st.floats(-40, 40, width=32), st.integers(0, 15), st.floats(0.125, 4, width=32))
def test_codes_at_the_ends_are_not_clipped(value, zero_point, scale):
    x = torch.tensor(value, requires_grad=True)
    fake_quantize(x, scale, zero_point, 0, 15).backward()
    steps = torch.round(torch.tensor(value) * (1 / torch.tensor(scale))) + zero_point
    assert x.grad is not None
    assert x.grad.item() == float(0 <= steps.item() <= 15)


def test_gradient_is_zero_where_clipped_even_if_it_arrives_infinite():
    x = torch.tensor([0.0, 100.0, float("nan"), float("inf")], requires_grad=True)
    incoming = torch.tensor([2.0, torch.inf, 1.0, torch.nan])
    fake_quantize(x, 1.0, 0, -7, 7).backward(incoming)
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 0.0, 0.0, 0.0]


def test_the_clipped_identity_has_this_gradient():
    """Away from the steps, the estimator differentiates the clamp that surrounds rounding."""
    low, high = -7.5 * 0.25, 7.5 * 0.25
    x = torch.linspace(-3, 3, 97, dtype=torch.float64).add(0.0123).requires_grad_()
    (estimated,) = torch.autograd.grad(fake_quantize(x, 0.25, 0, -7, 7).sum(), x)
    step = 1e-6
    with torch.no_grad():
        difference = (x + step).clamp(low, high) - (x - step).clamp(low, high)
    torch.testing.assert_close(estimated, difference / (2 * step), atol=1e-6, rtol=0)


def test_backward_is_linear_and_differentiable():
    x = sample(torch.float64)

    def backward(incoming):
        output = fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1)
        return torch.autograd.grad(output, x, incoming, create_graph=True)[0]

    incoming = torch.randn(x.shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(backward, incoming, fast_mode=True)


def test_scale_and_zero_point_get_no_gradient():
    scale = torch.tensor(0.1, requires_grad=True)
    x = sample()
    output = fake_quantize(x, scale, 3, 0, 255)
    output.sum().backward()
    assert scale.grad is None
    assert not fake_quantize(x.detach(), scale, 3, 0, 255).requires_grad
    assert not quantize(x.detach(), scale, 3, 0, 255).is_floating_point()


def test_only_one_byte_per_element_is_kept_for_backward():
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        fake_quantize(sample(), SCALE, ZERO_POINT, 0, 255, 1)
    assert [(t.dtype, t.numel()) for t in kept] == [(torch.bool, 16 * 3 * 5)]


@pytest.mark.parametrize("beyond", [None, 0, 47])
def test_nothing_is_kept_where_nothing_is_clipped_on_a_cpu(beyond):
    kept: list[torch.Tensor] = []
    x = torch.linspace(-12.7, 12.7, 48).reshape(4, 12)
    if beyond is not None:
        x.view(-1)[beyond] *= 1.01
    x.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = fake_quantize(x, 0.1, 0, -127, 127)
    output.sum().backward()
    expected = torch.ones(48)
    if beyond is not None:
        expected[beyond] = 0
    assert x.grad is not None
    assert torch.equal(x.grad.view(-1), expected)
    assert len(kept) == (beyond is not None)


def test_tensors_without_numbers_are_fake_quantized():
    with FakeTensorMode(allow_non_fake_inputs=True):
        output = fake_quantize(torch.ones(4, 3, requires_grad=True), SCALE, ZERO_POINT, 0, 255, 1)
        output.sum().backward()
    assert output.shape == (4, 3)
    assert fake_quantize(torch.ones(2, device="meta", requires_grad=True), 1.0, 0, 0, 1).is_meta
    assert fake_quantize(torch.ones(0, requires_grad=True), 1.0, 0, 0, 1).shape == (0,)


def test_nothing_is_kept_without_gradient():
    kept: list[torch.Tensor] = []
    x = sample()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        with torch.no_grad():
            fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1)
        fake_quantize(x.detach(), SCALE, ZERO_POINT, 0, 255, 1)
    assert kept == []


# Dynamo itself instantiates the context class of autograd functions.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("axis", [None, 1])
def test_compiles_without_a_graph_break(axis):
    scale, zero_point = (SCALE, ZERO_POINT) if axis == 1 else (SCALE[0], ZERO_POINT[0])

    def both(x, scale, zero_point):
        code = quantize(x, scale, zero_point, 0, 255, axis)
        return fake_quantize(x, scale, zero_point, 0, 255, axis), code

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    x, twin = sample(), sample()
    output, code = compiled(x, scale, zero_point)
    expected, expected_code = both(twin, scale, zero_point)
    assert torch.equal(output, expected)
    assert torch.equal(code, expected_code)
    output.square().sum().backward()
    expected.square().sum().backward()
    assert x.grad is not None
    assert twin.grad is not None
    assert torch.equal(x.grad, twin.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    for x in (sample(), sample(dtype)):
        expected = fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1)
        with torch.autocast("cpu", dtype=dtype):
            output = fake_quantize(x, SCALE, ZERO_POINT, 0, 255, 1)
            code = quantize(x, SCALE, ZERO_POINT, 0, 255, 1)
            real = dequantize(code, SCALE, ZERO_POINT, 1, x.dtype)
        assert output.dtype == real.dtype == x.dtype
        assert torch.equal(output, expected)
        assert torch.equal(real, expected)

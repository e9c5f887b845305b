"""Forward is the framework's arithmetic, the gradients are the papers' equations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_manager.quantization import QuantizationScheme, fake_quantize
from compression_plugins.learned_scale.arithmetic import (
    IntegerZeroPoint,
    PositiveScale,
    learned_fake_quantize,
)

SCHEMES = [
    QuantizationScheme(bits=1),
    QuantizationScheme(bits=1, symmetric=False),
    QuantizationScheme(bits=2, granularity="channel"),
    QuantizationScheme(bits=2, symmetric=False, signed=False),
    QuantizationScheme(bits=3, granularity="channel", axis=1),
    QuantizationScheme(bits=3, granularity="group", group_size=4),
    QuantizationScheme(bits=4, symmetric=False, granularity="group", group_size=5),
    QuantizationScheme(bits=8, symmetric=False, granularity="channel", axis=-1),
    QuantizationScheme(bits=8, signed=False),
    QuantizationScheme(bits=16, narrow_range=False),
]


def shared(shape: tuple[int, ...], scheme: QuantizationScheme) -> tuple[Any, tuple[int, ...]]:
    """Return for every element the index of its scale, and the shape of the scales."""
    if scheme.granularity == "channel":
        axis = scheme.axis % len(shape)
        return np.indices(shape)[axis], (shape[axis],)
    if scheme.granularity == "group":
        length = int(np.prod(shape[1:]))
        groups = -(-length // scheme.group_size)
        within = np.arange(length) // scheme.group_size
        index = np.arange(shape[0])[:, None] * groups + within
        return index.reshape(shape), (shape[0], groups)
    return np.zeros(shape, dtype=int), ()


def reference(v: Any, s: Any, z: Any, scheme: QuantizationScheme) -> tuple[Any, Any, Any, Any]:
    """Return y, dy/dv, dy/ds and dy/dz of each element, from the papers' own coordinates.

    LSQ+ has y = clamp(round((v - b) / s), n, p) * s + b and (eq. 5 and 7)
    dy/ds = round((v - b) / s) - (v - b) / s inside, n or p outside; dy/db = 0 or 1.
    Here b = -z * s, so that by the chain rule dy/ds at fixed z is dy/ds - z * dy/db, and dy/dz is
    -s * dy/db.
    """
    n, p = scheme.quant_min, scheme.quant_max
    b = -z * s
    u = (v - b) / s
    code = np.clip(np.rint(u), n, p)
    inside = (u >= n) & (u <= p)
    by_scale = np.where(inside, np.rint(u) - u, np.where(u < n, n, p))
    by_offset = np.where(inside, 0.0, 1.0)
    return code * s + b, inside * 1.0, by_scale - z * by_offset, -s * by_offset


@settings(max_examples=60, deadline=None)
@given(
    scheme=st.sampled_from(SCHEMES),
    shape=st.sampled_from([(3, 4), (2, 7, 2), (5, 1), (4, 3, 2, 2)]),
    factor=st.sampled_from([1.0, 0.125]),
    seed=st.integers(0, 2**16),
)
def test_gradients_are_those_of_the_papers(scheme, shape, factor, seed):
    random = np.random.default_rng(seed)
    index, scale_shape = shared(shape, scheme)
    # Powers of two, so that float32 divides without rounding as float64 does.
    scale = 2.0 ** random.integers(-3, 2, scale_shape)
    zero = np.full(scale_shape, scheme.symmetric_zero_point)
    if not scheme.symmetric:
        zero = random.integers(scheme.quant_min, scheme.quant_max + 1, scale_shape)
    s, z = np.asarray(scale).reshape(-1)[index], np.asarray(zero).reshape(-1)[index]
    width = scheme.quant_max - scheme.quant_min
    steps = random.integers(-width, 2 * width + 1, shape) - width // 3
    v = (steps + random.integers(-7, 8, shape) / 16.0) * s
    upstream = random.integers(-8, 9, shape) / 4.0

    inputs = torch.tensor(v, dtype=torch.float32, requires_grad=True)
    scales = torch.tensor(scale, dtype=torch.float32, requires_grad=True)
    zeros = torch.tensor(zero, dtype=torch.float32, requires_grad=True)
    output = learned_fake_quantize(inputs, scales, zeros, scheme, gradient_factor=factor)
    output.backward(torch.tensor(upstream, dtype=torch.float32))

    y, by_input, by_scale, by_zero = reference(v, s, z, scheme)
    np.testing.assert_array_equal(output.detach().numpy(), y)
    np.testing.assert_array_equal(inputs.grad.numpy(), upstream * by_input)
    for actual, slope in ((scales.grad, by_scale), (zeros.grad, by_zero)):
        sums = np.zeros(max(int(np.prod(scale_shape)), 1))
        np.add.at(sums, index.reshape(-1), (upstream * slope).reshape(-1))
        expected = sums.reshape(scale_shape) * factor
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-5 * width)


def test_lsq_by_hand():
    # Esser et al., eq. 3: -v/s + round(v/s) inside, -Q_N below, Q_P above.
    scheme = QuantizationScheme(bits=2, narrow_range=False)  # -2 .. 1
    # The last two round to an end of the range, and lie outside of it.
    v = torch.tensor([0.75, -1.75, -9.0, 9.0, 1.25, -2.25], requires_grad=True)
    for position, slope in enumerate([0.25, -0.25, -2.0, 1.0, 1.0, -2.0]):
        scale = torch.ones((), requires_grad=True)
        output = learned_fake_quantize(v, scale, torch.zeros(()), scheme)
        output[position].backward()
        assert scale.grad.item() == slope


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_forward_is_fake_quantize_bit_for_bit(scheme, dtype):
    torch.manual_seed(0)
    input = (torch.randn(6, 10) * 3).to(dtype)
    _, shape = shared((6, 10), scheme)
    scale = torch.rand(shape) + 0.01
    zero = torch.full(shape, scheme.symmetric_zero_point)
    if not scheme.symmetric:
        zero = torch.randint(scheme.quant_min, scheme.quant_max + 1, shape)
    expected = fake_quantize(
        input,
        scale,
        zero,
        scheme.quant_min,
        scheme.quant_max,
        scheme.axis,
        group_size=scheme.group_size,
    )
    trained = input.clone().requires_grad_()
    for candidate in (trained, input):
        actual = learned_fake_quantize(candidate, scale, zero.float(), scheme)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)
    learned_fake_quantize(trained, scale, zero.float(), scheme).sum().backward()
    assert trained.grad.dtype == dtype


def test_nan_reaches_the_output_and_no_gradient():
    scheme = QuantizationScheme(bits=4, symmetric=False)
    input = torch.tensor([float("nan"), 100.0], requires_grad=True)
    scale, zero = torch.ones((), requires_grad=True), torch.zeros((), requires_grad=True)
    output = learned_fake_quantize(input, scale, zero, scheme)
    assert output.isnan().tolist() == [True, False]
    output.backward(torch.ones(2))
    assert scale.grad.item() == scheme.quant_max
    assert zero.grad.item() == -1.0
    assert input.grad.tolist() == [0.0, 0.0]


# Parametrization ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-3, 0.5, 40.0])
def test_a_step_changes_the_scale_by_a_share_of_itself(scale):
    log_scale = torch.tensor(scale, dtype=torch.float64).log().requires_grad_()
    # Against the difference quotient of the loss 3 * scale.
    (PositiveScale.apply(log_scale, 1e-7) * 3).backward()
    steps = [(log_scale.detach() + change).exp().item() for change in (-1e-6, 1e-6)]
    assert log_scale.grad.item() == pytest.approx(3 * (steps[1] - steps[0]) / 2e-6, rel=1e-6)
    assert torch.autograd.gradcheck(lambda value: PositiveScale.apply(value, 1e-7), (log_scale,))


def test_the_minimum_holds_and_can_be_left():
    for gradient, passed in ((1.0, 0.0), (-1.0, -0.01)):
        log_scale = torch.tensor(-50.0, requires_grad=True)
        scale = PositiveScale.apply(log_scale, 0.01)
        assert scale.item() == np.float32(0.01)
        (scale * gradient).backward()
        assert log_scale.grad.item() == pytest.approx(passed)


@pytest.mark.parametrize("bits", [1, 2, 8, 16, 23, 24])
@pytest.mark.parametrize("signed", [True, False])
def test_every_zero_point_is_held_exactly(bits, signed):
    scheme = QuantizationScheme(bits=bits, symmetric=False, signed=signed)
    n, p = scheme.quant_min, scheme.quant_max
    zero = torch.linspace(n, p, 100_001, dtype=torch.float64).round()
    fraction = ((zero - n) / (p - n)).to(torch.float32)
    assert torch.equal(IntegerZeroPoint.apply(fraction, n, p).double(), zero)


def test_the_gradient_of_the_fraction_is_that_of_the_real_valued_zero_point():
    fraction = torch.tensor([0.4, 0.0, 1.0], requires_grad=True)
    zero = IntegerZeroPoint.apply(fraction, -8, 7)
    assert zero.tolist() == [-2.0, -8.0, 7.0]
    zero.backward(torch.tensor([0.5, -0.5, 0.5]))
    assert fraction.grad.tolist() == [7.5, -7.5, 7.5]


def test_the_zero_point_stays_in_range_and_can_come_back():
    for fraction, gradient, passed in ((-0.5, 1.0, 0.0), (-0.5, -1.0, -1.0), (1.5, 1.0, 1.0)):
        value = torch.tensor(fraction, requires_grad=True)
        zero = IntegerZeroPoint.apply(value, 0, 1)
        assert zero.item() == float(fraction > 0)
        zero.backward(torch.tensor(gradient))
        assert value.grad.item() == passed


def test_a_fraction_exactly_at_an_end_follows_only_gradients_that_lead_back():
    fraction = torch.tensor([0.0, 0.0, 1.0, 1.0], requires_grad=True)
    IntegerZeroPoint.apply(fraction, -8, 7).backward(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    assert fraction.grad.tolist() == [0.0, -15.0, 15.0, 0.0]

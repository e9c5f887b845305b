"""Quantize, dequantize and fake-quantize, forward: against numpy and torch's fused operators."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    QuantizationScheme,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)

RANGES = [(-127, 127), (-128, 127), (0, 255), (1, 255), (-1, 1), (0, 15), (-32768, 32767)]
FLOATS = {torch.float32: np.float32, torch.float64: np.float64}

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)
scales = st.floats(np.float32(1e-6).item(), np.float32(1e6).item(), width=32)


def reference(x, scale, zero_point, quant_min, quant_max):
    """Integers and real numbers in numpy; scale and zero point broadcast against x."""
    inverse = np.float32(1) / np.asarray(scale, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        steps = np.rint(x * inverse.astype(x.dtype)).astype(np.float64)
        code = np.clip(steps + zero_point, quant_min, quant_max)
        real = (code - zero_point) * np.asarray(scale, np.float32).astype(np.float64)
    return code, real.astype(x.dtype)


def bits(tensor):
    """The exact representation, so that -0.0 differs from 0.0."""
    return np.ascontiguousarray(tensor.detach().numpy()).tobytes()


@st.composite
def problems(draw):
    dtype = draw(st.sampled_from(list(FLOATS.values())))
    width = 64 if dtype is np.float64 else 32
    numbers = st.floats(-1e4, 1e4, width=width) | st.floats(allow_nan=False, width=width)
    x = draw(hnp.arrays(dtype, draw(shapes), elements=numbers))
    quant_min, quant_max = draw(st.sampled_from(RANGES))
    axis = draw(st.sampled_from([None, *range(-x.ndim, x.ndim)]))
    count = () if axis is None else (x.shape[axis],)
    scale = draw(hnp.arrays(np.float32, count, elements=scales))
    zero_point = draw(hnp.arrays(np.int32, count, elements=st.integers(quant_min, quant_max)))
    return x, np.asarray(scale), np.asarray(zero_point), quant_min, quant_max, axis


@settings(deadline=None, max_examples=300)
@given(problems())
def test_equals_numpy_bit_for_bit(problem):
    x, scale, zero_point, quant_min, quant_max, axis = problem
    shape = [1] * x.ndim
    if axis is not None:
        shape[axis] = -1
    code, real = reference(x, scale.reshape(shape), zero_point.reshape(shape), quant_min, quant_max)
    arguments = (torch.tensor(scale), torch.tensor(zero_point))
    input = torch.tensor(x)
    integers = quantize(input, *arguments, quant_min, quant_max, axis)
    assert not integers.is_floating_point()
    np.testing.assert_array_equal(integers.numpy(), code)
    output = fake_quantize(input, *arguments, quant_min, quant_max, axis)
    assert bits(output) == real.tobytes()
    assert bits(dequantize(integers, *arguments, axis, input.dtype)) == real.tobytes()
    assert bits(input) == x.tobytes()


@st.composite
def grouped_problems(draw):
    x = draw(
        hnp.arrays(
            np.float32,
            draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=5)),
            elements=st.floats(-1e4, 1e4, width=32),
        )
    )
    group_size = draw(st.integers(1, 9))
    rows, length = x.shape[0], int(np.prod(x.shape[1:]))
    count = (rows, -(-length // group_size))
    quant_min, quant_max = draw(st.sampled_from(RANGES))
    scale = draw(hnp.arrays(np.float32, count, elements=scales))
    zero_point = draw(hnp.arrays(np.int32, count, elements=st.integers(quant_min, quant_max)))
    return x, scale, zero_point, quant_min, quant_max, group_size


@settings(deadline=None, max_examples=200)
@given(grouped_problems())
def test_groups_equal_numpy_bit_for_bit(problem):
    x, scale, zero_point, quant_min, quant_max, group_size = problem
    group = np.arange(x[0].size) // group_size
    own_scale, own_zero_point = (each[:, group].reshape(x.shape) for each in (scale, zero_point))
    code, real = reference(x, own_scale, own_zero_point, quant_min, quant_max)
    arguments = (torch.tensor(scale), torch.tensor(zero_point), quant_min, quant_max)
    integers = quantize(torch.tensor(x), *arguments, group_size=group_size)
    np.testing.assert_array_equal(integers.numpy(), code)
    assert bits(fake_quantize(torch.tensor(x), *arguments, group_size=group_size)) == real.tobytes()
    values = dequantize(integers, *arguments[:2], group_size=group_size)
    assert bits(values) == real.tobytes()


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_tokens_equal_one_tensor_at_a_time(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    scale = torch.rand((*shape[:-1], 1), generator=generator) / 50 + 0.001
    zero_point = torch.randint(0, 255, scale.shape, generator=generator)
    output = fake_quantize(x, scale, zero_point, 0, 255)
    for index in np.ndindex(*shape[:-1]):
        expected = fake_quantize(x[index], scale[index], zero_point[index], 0, 255)
        assert torch.equal(output[index], expected)


def ties(scale, dtype=torch.float32):
    """Numbers at and beside every middle between two integers, and beyond both ends."""
    middle = (torch.arange(-600, 600, dtype=torch.float64) / 2 * scale).to(torch.float32)
    up = torch.full_like(middle, torch.inf)
    return torch.cat([middle, torch.nextafter(middle, up), torch.nextafter(middle, -up)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.1, 0.019607844, 1.0, 0.3333, 7e-5])
@pytest.mark.parametrize(("quant_min", "quant_max", "zero_point"), [(-128, 127, 0), (0, 255, 113)])
def test_equals_torch_per_tensor(dtype, scale, quant_min, quant_max, zero_point):
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([ties(scale), torch.randn(5000, generator=generator) * 100 * scale]).to(dtype)
    expected = torch.fake_quantize_per_tensor_affine(
        x, torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), quant_min, quant_max
    )
    for arguments in (
        (torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)),
        (scale, zero_point),
    ):
        output = fake_quantize(x, *arguments, quant_min, quant_max)
        assert output.dtype == dtype
        # torch's operator for one scale rounds float64 results to float32.
        assert torch.equal(output.float(), expected.float())


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_equals_torch_per_channel(axis):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 6, 7, 8, generator=generator) * 30
    channels = x.shape[axis]
    scale = torch.rand(channels, generator=generator) + 1e-3
    zero_point = torch.randint(0, 256, (channels,), generator=generator, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, 0, 255)
    assert torch.equal(fake_quantize(x, scale, zero_point, 0, 255, axis), expected)
    assert torch.equal(fake_quantize(x, scale, zero_point, 0, 255, axis - 4), expected)


def test_the_reciprocal_decides_at_ties():
    scale = torch.linspace(0.01, 1, 4001)
    x = scale * 2.5
    by_division = torch.round(x / scale)
    code = quantize(x, scale, torch.zeros(4001, dtype=torch.int32), -127, 127, 0)
    assert (code != by_division).any()
    assert torch.equal(code.float(), torch.round(x * (1 / scale)))


@pytest.mark.parametrize("bits_", [16, 20, 24, 25, 31, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_long_integers_round_trip(bits_, dtype):
    generator = torch.Generator().manual_seed(0)
    quant_min, quant_max = -(2 ** (bits_ - 1)), 2 ** (bits_ - 1) - 1
    x = torch.randn(20000, generator=generator).to(dtype)
    scale = torch.tensor(2.0 / 2 ** (bits_ - 1))
    zero_point = torch.tensor(quant_max // 3, dtype=torch.int64)
    code = quantize(x, scale, zero_point, quant_min, quant_max)
    assert code.min() == quant_min
    assert code.max() == quant_max
    output = fake_quantize(x, scale, zero_point, quant_min, quant_max)
    assert bits(output.double()) == bits(dequantize(code, scale, zero_point, None, dtype).double())
    if bits_ > 24:
        steps = np.rint(x.double().numpy() * float(np.float32(1) / scale.numpy()))
        expected = np.clip(steps + zero_point.item(), quant_min, quant_max)
        np.testing.assert_array_equal(code.numpy(), expected)


def test_not_a_number_and_infinities():
    x = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0])
    output = fake_quantize(x, 0.5, 3, 0, 15)
    assert output[0].isnan()
    assert output[1:].tolist() == [6.0, -1.5, 1.0]
    assert quantize(x, 0.5, 3, 0, 15).tolist() == [3, 15, 0, 5]
    tracked = fake_quantize(x.requires_grad_(), 0.5, 3, 0, 15)
    assert tracked[0].isnan()
    assert tracked[1:].tolist() == [6.0, -1.5, 1.0]


def test_quantized_values_are_fixed_points():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    once = fake_quantize(x, 0.02, 7, -128, 127)
    assert torch.equal(fake_quantize(once, 0.02, 7, -128, 127), once)
    assert (once[x.abs() < 2] - x[x.abs() < 2]).abs().max() <= 0.01 + 1e-6


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 3),
        lambda x: x[:, :, ::2, 1:],
        lambda x: x[:0],
        lambda x: x[:1].expand(5, -1, -1, -1),
    ],
)
def test_any_memory_layout(view, gradient, axis):
    base = torch.randn(4, 6, 5, 6, generator=torch.Generator().manual_seed(0))
    x = view(base).requires_grad_(gradient)
    scale = torch.tensor(0.05) if axis is None else torch.linspace(0.01, 0.1, 6)
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    output = fake_quantize(x, scale, zero_point, -8, 7, axis)
    expected = fake_quantize(x.detach().clone().contiguous(), scale, zero_point, -8, 7, axis)
    assert torch.equal(output, expected)
    if x.is_contiguous(memory_format=torch.channels_last) and x.numel():
        assert output.is_contiguous(memory_format=torch.channels_last)
        code = quantize(x, scale, zero_point, -8, 7, axis)
        assert code.is_contiguous(memory_format=torch.channels_last)
        real = dequantize(code, scale, zero_point, axis)
        assert real.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 8, 28])
@pytest.mark.parametrize("symmetric", [True, False])
@settings(deadline=None, max_examples=30)
@given(share=st.floats(0, 1, width=32))
def test_finite_values_stay_finite_in_narrow_types(share, symmetric, bits, dtype):
    """The level that the zero point's rounding moved past the largest number becomes it."""
    largest = torch.finfo(dtype).max
    x = torch.tensor([largest, -largest * share, 0.0, 1.0], dtype=dtype, requires_grad=True)
    scheme = QuantizationScheme(bits, symmetric)
    scale, zero_point = choose_qparams(x.min(), x.max(), scheme)
    y = fake_quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert y.isfinite().all()
    integers = quantize(x, scale, zero_point, scheme.quant_min, scheme.quant_max)
    assert torch.equal(dequantize(integers, scale, zero_point, dtype=dtype), y)
    exact = dequantize(integers, scale, zero_point, dtype=torch.float64)
    assert torch.equal(y, exact.clamp(-largest, largest).to(dtype))
    y.sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_not_a_number_and_infinities_in_narrow_types(dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    largest = torch.finfo(dtype).max
    y = fake_quantize(x, largest / 100, 0, -128, 127)
    assert y[0].isnan()
    assert y[1:].tolist() == [largest, -largest]


@pytest.mark.parametrize("shape", [(0, 6), (2, 0), (0,), (0, 0)])
def test_empty_tensors_in_groups(shape):
    x = torch.ones(shape, requires_grad=True)
    groups = -(-x.shape[1:].numel() // 4)
    scale, zero_point = torch.ones(shape[0], groups), torch.zeros(shape[0], groups)
    integers = quantize(x, scale, zero_point, -8, 7, group_size=4)
    assert integers.shape == dequantize(integers, scale, zero_point, group_size=4).shape == shape
    fake_quantize(x, scale, zero_point, -8, 7, group_size=4).sum().backward()
    assert x.grad.shape == shape


def test_a_tensor_of_one_element_is_one_scale_for_all():
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    scale, zero_point = torch.tensor([0.25]), torch.tensor([3])
    code = quantize(x, 0.25, 3, 0, 15)
    assert torch.equal(quantize(x, scale, zero_point, 0, 15), code)
    assert torch.equal(fake_quantize(x, scale, zero_point, 0, 15), fake_quantize(x, 0.25, 3, 0, 15))
    assert torch.equal(dequantize(code, scale, zero_point), dequantize(code, 0.25, 3))


def test_a_scale_of_more_digits_is_rounded_to_float32():
    x, wide = torch.tensor([0.26, 1.1], dtype=torch.float64), torch.tensor(0.1, dtype=torch.float64)
    expected = np.array([3.0, 11.0]) * np.float64(np.float32(0.1))
    output = fake_quantize(x, wide, 0, -128, 127)
    assert bits(output) == expected.tobytes()
    code = quantize(x, wide, 0, -128, 127)
    assert bits(dequantize(code, wide, 0, dtype=torch.float64)) == expected.tobytes()


def test_arguments_are_left_alone():
    x, scale, zero_point = torch.randn(8), torch.tensor([0.5]), torch.tensor([3])
    before = x.clone()
    code = quantize(x, scale, zero_point, 0, 15)
    kept = code.clone()
    fake_quantize(x, scale, zero_point, 0, 15)
    dequantize(code, scale, zero_point)
    wide = kept.to(torch.int64)
    dequantize(wide, scale, zero_point, dtype=torch.float64)
    assert torch.equal(x, before)
    assert torch.equal(code, kept)
    assert torch.equal(wide, kept.to(torch.int64))
    assert (scale.item(), zero_point.item()) == (0.5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: quantize(torch.ones(3, dtype=torch.int32), 1.0, 0, 0, 15), "torch.int32"),
        (lambda: fake_quantize(torch.ones(3, dtype=torch.bool), 1.0, 0, 0, 15), "torch.bool"),
        (lambda: quantize(torch.ones(3, dtype=torch.complex64), 1.0, 0, 0, 15), "complex64"),
        (lambda: dequantize(torch.ones(3), 1.0, 0), "integer tensor, got torch.float32"),
        (lambda: dequantize(torch.ones(3) > 0, 1.0, 0), "integer tensor, got torch.bool"),
        (lambda: dequantize(torch.ones(3) + 0j, 1.0, 0), "integer tensor, got torch.complex64"),
        (
            lambda: dequantize(torch.ones(3, dtype=torch.int8), 1.0, 0, dtype=torch.int32),
            "floating-point numbers, not torch.int32",
        ),
        (lambda: fake_quantize(torch.ones(3), 1.0, 0, 7, 7), "less than quant_max, got 7 and 7"),
        (lambda: fake_quantize(torch.ones(3), 1.0, 0, 0, 15, 1), r"axis 1 does not .*\(3,\)"),
        (lambda: fake_quantize(torch.ones(3), 1.0, 0, 0, 15, -2), r"axis -2 does not .*\(3,\)"),
        (lambda: fake_quantize(torch.ones(3), torch.ones(3), 0, 0, 15), r"scale .* needs an axis"),
        (
            lambda: fake_quantize(torch.ones(2, 3), torch.ones(2), 0, 0, 15, 1),
            r"scale of shape \(2,\) does not fit axis 1 .*expected \(3,\)",
        ),
        (
            lambda: quantize(torch.ones(2, 3), torch.ones(3), torch.ones(2), 0, 15, 1),
            r"zero_point of shape \(2,\) does not fit axis 1",
        ),
        (
            lambda: quantize(torch.ones(2, 3), torch.ones(2, 1), 0, 0, 15, group_size=2),
            r"scale of shape \(2, 1\) does not fit groups of 2 .*expected \(2, 2\)",
        ),
        (
            lambda: quantize(torch.ones(2, 3), torch.ones(2, 2), 0, 0, 15, 0, group_size=2),
            "exclude each other",
        ),
        (
            lambda: quantize(torch.ones(2, 3), torch.ones(2, 2), 0, 0, 15, group_size=0),
            "group_size is at least 1",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(QuantizationError, match=message):
        call()


@pytest.mark.parametrize("scale", [0.0, -0.1, float("nan"), float("inf")])
def test_a_number_that_is_no_scale(scale):
    with pytest.raises(QuantizationError, match="scale is positive and finite, got"):
        fake_quantize(torch.ones(2), scale, 0, -8, 7)


def test_a_number_that_is_no_zero_point():
    with pytest.raises(QuantizationError, match=r"zero_point is an integer, got 0\.5"):
        quantize(torch.ones(2), 0.1, 0.5, -8, 7)

"""Gradients of convolutions against float64, of operands that are rounded to bfloat16 first."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.native import NativePasses
from compression_manager.quantization.integer.passes import Passes
from compression_manager.quantization.integer.torch_passes import TorchPasses

pytestmark = pytest.mark.usefixtures("convolution_gradients")

FACTOR = 0.0123
# What float32 sums may differ by, relative to the sum of the magnitudes of the terms.
TOLERANCE = 2e-6


class Case(NamedTuple):
    """A convolution: the shape of its input, and what it computes."""

    images: tuple[int, ...]
    columns: int
    kernel: tuple[int, ...]
    geometry: Geometry


def moved(axes: int, stride: int = 1, padding: int = 0, dilation: int = 1) -> Geometry:
    """A geometry that is the same along all axes."""
    return Geometry((stride,) * axes, (padding,) * axes, (dilation,) * axes, 1)


CASES = [
    # Channels that fill tiles (32 by 16), panels (64) and blocks of places (512), and more.
    Case((2, 64, 9, 16), 64, (3, 3), moved(2, padding=1)),
    Case((3, 128, 5, 8), 96, (3, 3), moved(2, padding=1)),
    Case((2, 130, 4, 7), 70, (3, 3), moved(2, padding=1)),
    Case((5, 32, 13, 17), 80, (3, 3), moved(2, padding=1)),
    # Odd ones and few.
    Case((2, 3, 12, 11), 20, (7, 5), moved(2, padding=3)),
    Case((2, 20, 12, 11), 30, (3, 3), moved(2, padding=1)),
    Case((2, 30, 6, 7), 3, (3, 3), moved(2, padding=1)),
    Case((1, 1, 1, 1), 1, (1, 1), moved(2)),
    Case((7, 5, 1, 1), 9, (3, 3), moved(2, padding=1)),
    # Strides: taps that no place reads, places that none does, and more padding than kernel.
    Case((2, 40, 9, 10), 33, (3, 3), moved(2, stride=2, padding=1)),
    Case((2, 17, 9, 10), 33, (1, 1), moved(2, stride=2)),
    Case((2, 6, 11, 11), 8, (2, 2), moved(2, stride=3, padding=1)),
    Case((1, 6, 11, 11), 8, (4, 4), moved(2, stride=4)),
    Case((2, 6, 5, 5), 8, (2, 2), moved(2, padding=4)),
    Case((2, 6, 5, 4), 8, (2, 3), moved(2, stride=3, padding=7)),
    # Dilations, with strides that divide them, and that do not.
    Case((2, 18, 12, 12), 34, (3, 3), moved(2, padding=2, dilation=2)),
    Case((2, 18, 12, 12), 34, (3, 3), moved(2, stride=2, padding=2, dilation=2)),
    Case((2, 18, 13, 12), 34, (3, 3), moved(2, stride=2, padding=3, dilation=3)),
    Case((2, 18, 13, 12), 34, (3, 3), moved(2, stride=4, padding=1, dilation=2)),
    # One dimension and three.
    Case((3, 21, 50), 40, (5,), moved(1, stride=2, padding=2)),
    Case((3, 64, 600), 64, (3,), moved(1, padding=1)),
    Case((2, 10, 5, 6, 7), 19, (3, 3, 3), moved(3, padding=1)),
    Case((2, 10, 5, 6, 7), 19, (2, 3, 1), moved(3, stride=2, padding=1)),
]


class Operands(NamedTuple):
    gradient: Tensor
    codes: Tensor
    weight: Tensor
    scale: Tensor


def make(case: Case, dtype: torch.dtype, last: bool, seed: int = 0) -> Operands:
    """Return operands with all values of the integers."""
    generator, limits = torch.Generator().manual_seed(seed), torch.iinfo(dtype)
    codes = torch.randint(limits.min, limits.max + 1, case.images, generator=generator, dtype=dtype)
    shape = case.columns, case.images[1], *case.kernel
    weight = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    places = case.geometry.places(case.images[2:], case.kernel)
    gradient = torch.randn(case.images[0], case.columns, *places, generator=generator)
    scale = torch.rand(case.columns, generator=generator) + 0.1
    if last:
        gradient, codes, weight = map(with_channels_last, (gradient, codes, weight))
    return Operands(gradient, codes, weight, scale)


def with_channels_last(tensor: Tensor) -> Tensor:
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).double()


def reference(
    gradient: Tensor, input: Tensor, weight: Tensor, its: Geometry
) -> tuple[Tensor, Tensor]:
    """The gradients of input and weight in float64."""
    stride, padding, dilation, groups = its
    input, weight = input.double().requires_grad_(), weight.double().requires_grad_()
    convolutions: tuple[Callable[..., Tensor], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
    convolve = convolutions[len(stride) - 1]
    output = convolve(input, weight, None, stride, padding, dilation, groups)
    for_input, for_weight = torch.autograd.grad(output, [input, weight], gradient.double())
    return for_input, for_weight


def check_input(passes: Passes, case: Case, made: Operands, tolerance: float = TOLERANCE) -> None:
    gradient, codes, weight, scale = made
    its = case.geometry
    output = passes.convolution_input_gradient(gradient, weight, scale, codes, its)
    scaled = rounded(gradient * scale.reshape(-1, *[1] * len(case.kernel)))
    expected = reference(scaled, codes, weight, its)[0]
    bound = reference(scaled.abs(), codes, weight.double().abs(), its)[0]
    assert output.dtype == torch.float32
    assert output.stride() == codes.stride()
    assert_close(output, expected, bound, tolerance)


def check_weight(
    passes: Passes, case: Case, made: Operands, zero_point: int, tolerance: float = TOLERANCE
) -> None:
    gradient, codes, weight, _ = made
    its, numbers = case.geometry, codes.double() - zero_point
    output = passes.convolution_weight_gradient(gradient, codes, zero_point, FACTOR, weight, its)
    expected = reference(rounded(gradient), numbers, weight, its)[1] * FACTOR
    bound = reference(rounded(gradient).abs(), numbers.abs(), weight, its)[1] * FACTOR
    assert output.dtype == torch.float32
    assert output.stride() == weight.stride()
    assert_close(output, expected, bound, tolerance)


def assert_close(output: Tensor, expected: Tensor, bound: Tensor, tolerance: float) -> None:
    assert output.shape == expected.shape
    assert output.isfinite().all()
    error = (output.double() - expected).abs() / (bound + 1e-30)
    assert error.max() < tolerance


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_input(passes: NativePasses, case: Case, last: bool) -> None:
    check_input(passes, case, make(case, torch.uint8, last))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("dtype", "zero_point"), [(torch.uint8, 0), (torch.uint8, 131), (torch.int8, -128)]
)
@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_weight(
    passes: NativePasses, case: Case, dtype: torch.dtype, zero_point: int, last: bool
) -> None:
    check_weight(passes, case, make(case, dtype, last), zero_point)


@settings(deadline=None, max_examples=100)
@given(
    count=st.integers(1, 3),
    channels=st.integers(1, 40),
    columns=st.integers(1, 70),
    axes=st.lists(
        st.tuples(
            st.integers(1, 20), st.integers(1, 4), st.integers(1, 4), st.integers(0, 4),
            st.integers(1, 3),
        ),
        min_size=1,
        max_size=2,
    ),
    zero_point=st.integers(0, 255),
    last=st.booleans(),
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_any_geometry(
    passes: NativePasses,
    count: int,
    channels: int,
    columns: int,
    axes: list[tuple[int, int, int, int, int]],
    zero_point: int,
    last: bool,
    seed: int,
) -> None:
    sizes, kernel, stride, padding, dilation = zip(*axes, strict=True)
    its = Geometry(stride, padding, dilation, 1)
    assume(min(its.places(sizes, kernel)) > 0)
    case = Case((count, channels, *sizes), columns, kernel, its)
    made = make(case, torch.uint8, last, seed)
    check_weight(passes, case, made, zero_point)
    check_input(passes, case, made)


@pytest.mark.parametrize("case", CASES[:5])
def test_threads_share_images_and_columns(passes: NativePasses, case: Case, threads: int) -> None:
    made = make(case, torch.uint8, last=True)
    check_input(passes, case, made)
    check_weight(passes, case, made, 3)


def test_many_images_come_in_parts(passes: NativePasses) -> None:
    case = Case((40, 64, 16, 16), 64, (3, 3), moved(2, padding=1))
    made = make(case, torch.uint8, last=True)
    check_input(passes, case, made)
    check_weight(passes, case, made, 131)


def test_equal_calls_compute_equally(passes: NativePasses) -> None:
    case = Case((20, 64, 16, 16), 40, (3, 3), moved(2, padding=1))
    gradient, codes, weight, scale = make(case, torch.uint8, last=True)
    first, second = (
        (
            passes.convolution_input_gradient(gradient, weight, scale, codes, case.geometry),
            passes.convolution_weight_gradient(gradient, codes, 9, FACTOR, weight, case.geometry),
        )
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_the_gradient_may_have_any_strides(passes: NativePasses) -> None:
    case = Case((2, 20, 5, 6), 30, (3, 3), moved(2, padding=1))
    made = make(case, torch.uint8, last=False)
    for gradient in (
        torch.ones(()).expand_as(made.gradient),
        made.gradient.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        changed = made._replace(gradient=gradient)
        check_input(passes, case, changed)
        check_weight(passes, case, changed, 131)


def test_a_value_that_is_not_finite_reaches_only_what_read_it(passes: NativePasses) -> None:
    case = Case((2, 20, 9, 9), 30, (3, 3), moved(2, padding=1))
    gradient, codes, weight, scale = make(case, torch.uint8, last=True)
    gradient[1, 7, 4, 5] = float("nan")
    for_input = passes.convolution_input_gradient(gradient, weight, scale, codes, case.geometry)
    assert for_input[1, :, 3:6, 4:7].isnan().all()
    assert for_input.isnan().sum() == 20 * 9
    for_weight = passes.convolution_weight_gradient(
        gradient, codes, 9, FACTOR, weight, case.geometry
    )
    assert for_weight[7].isnan().all()
    assert for_weight.isnan().sum() == 20 * 9


@pytest.mark.parametrize("case", [CASES[1], CASES[9], CASES[-1]])
def test_plain_operations_round_the_result_as_well(case: Case) -> None:
    made = make(case, torch.uint8, last=len(case.kernel) == 2)
    check_input(TorchPasses(), case, made, tolerance=2**-8)
    check_weight(TorchPasses(), case, made, 131, tolerance=2**-8)
    assert not TorchPasses().supports_convolution_gradients()


def test_what_does_not_fit_is_refused(passes: NativePasses) -> None:
    case = Case((2, 3, 5, 5), 4, (3, 3), moved(2, padding=1))
    gradient, codes, weight, scale = make(case, torch.uint8, last=False)
    its = case.geometry

    def refused(
        message: str,
        gradient: Tensor = gradient,
        codes: Tensor = codes,
        weight: Tensor = weight,
        its: Geometry = its,
    ) -> None:
        with pytest.raises(QuantizationError, match=message):
            passes.convolution_input_gradient(gradient, weight, scale, codes, its)
        with pytest.raises(QuantizationError, match=message):
            passes.convolution_weight_gradient(gradient, codes, 7, FACTOR, weight, its)

    refused(r"gradient is a float32 tensor \(2, 4, 5, 5\)", gradient=gradient[:, :3])
    refused("gradient is a float32 tensor .*float64", gradient=gradient.double())
    refused("gradient is a float32 tensor .*meta", gradient=gradient.to("meta"))
    refused("codes is a dense uint8 or int8", codes=codes.float())
    refused("channels last", codes=codes.transpose(2, 3))
    refused("as many channels", codes=codes[:, :2].contiguous())
    refused("weight is a dense int8", weight=weight.float())
    refused("one group", its=its._replace(groups=2))
    refused("is 0 and no padding negative", its=its._replace(stride=(0, 1)))
    refused("is 0 and no padding negative", codes=codes[:0])
    refused("larger than the padded", its=its._replace(dilation=(4, 4)))
    with pytest.raises(QuantizationError, match="scale has 4 elements"):
        passes.convolution_input_gradient(gradient, weight, scale[:3], codes, its)
    with pytest.raises(QuantizationError, match="between 0 and 255, got 256"):
        passes.convolution_weight_gradient(gradient, codes, 256, FACTOR, weight, its)

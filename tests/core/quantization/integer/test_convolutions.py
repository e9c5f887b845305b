"""Exact convolutions of integers, against loops of numpy over 64-bit integers."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer import exact
from compression_manager.quantization.integer.geometry import Geometry
from compression_manager.quantization.integer.passes import Passes
from dense_tensors import same

CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


def operands(
    images: tuple[int, ...], weight: tuple[int, ...], last: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return codes, a weight's codes, scales and a bias; with all extreme values."""
    generator = np.random.default_rng(seed)
    codes = torch.from_numpy(generator.integers(0, 256, images, dtype=np.uint8))
    numbers = torch.from_numpy(generator.integers(-128, 128, weight, dtype=np.int8))
    codes.view(-1)[0], codes.view(-1)[-1] = 0, 255
    numbers.view(-1)[0], numbers.view(-1)[-1] = -128, 127
    if last and len(images) - 2 in CHANNELS_LAST:
        codes = codes.contiguous(memory_format=CHANNELS_LAST[len(images) - 2])
        numbers = numbers.contiguous(memory_format=CHANNELS_LAST[len(images) - 2])
    scale = generator.random(weight[0], dtype=np.float32) * np.float32(1e-3)
    bias = generator.normal(size=weight[0]).astype(np.float32)
    return codes, numbers, torch.from_numpy(scale), torch.from_numpy(bias)


def expected(
    codes: Tensor,
    weight: Tensor,
    zero_point: int,
    scale: Tensor,
    bias: Tensor | None,
    its: Geometry,
) -> np.ndarray:
    """Sum up each tap of the kernel in 64-bit integers, then round three times."""
    axes = len(its.stride)
    numbers = codes.numpy().astype(np.int64) - zero_point
    padded = np.pad(numbers, [(0, 0), (0, 0), *[(size, size) for size in its.padding]])
    kernel, factors = tuple(weight.shape[2:]), weight.numpy().astype(np.int64)
    places = [
        (padded.shape[2 + axis] - its.dilation[axis] * (kernel[axis] - 1) - 1) // its.stride[axis]
        + 1
        for axis in range(axes)
    ]
    sums = np.zeros((len(codes), weight.shape[0], *places), np.int64)
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(
                tap[axis] * its.dilation[axis],
                tap[axis] * its.dilation[axis] + its.stride[axis] * (places[axis] - 1) + 1,
                its.stride[axis],
            )
            for axis in range(axes)
        )
        sums += np.einsum("nc...,oc->no...", padded[:, :, *window], factors[:, :, *tap])
    column = (-1, *[1] * axes)
    output = sums.astype(np.float32) * scale.numpy().reshape(column)
    return output if bias is None else output + bias.numpy().reshape(column)


def check(
    passes: Passes, made: Any, zero_point: int, its: Geometry, with_bias: bool = True
) -> None:
    codes, weight, scale, bias = made
    addend = bias if with_bias else None
    output = passes.convolve_integers(codes, weight, zero_point, scale, addend, its)
    assert output.dtype == torch.float32
    assert not output._is_view()
    memory_format = torch.contiguous_format
    if not codes.is_contiguous():
        memory_format = CHANNELS_LAST[codes.dim() - 2]
    assert output.is_contiguous(memory_format=memory_format)
    assert same(output.numpy(), expected(codes, weight, zero_point, scale, addend, its))


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    ("images", "weight"),
    [
        ((3, 3, 9, 8), (20, 3, 3, 3)),  # an odd number of channels, and more than one panel
        ((2, 64, 7, 9), (16, 64, 3, 3)),  # more terms than float32 holds
        ((1, 530, 3, 4), (5, 530, 1, 1)),
        ((5, 4, 30), (9, 4, 5)),
        ((2, 4, 5, 6, 7), (3, 4, 2, 3, 1)),
        ((7, 2, 60, 50), (3, 2, 1, 3)),  # more images than are widened at a time
    ],
)
def test_sums_are_exact_and_rounded_three_times(
    passes: Passes, images: tuple[int, ...], weight: tuple[int, ...], last: bool, threads: int
) -> None:
    axes = len(images) - 2
    made = operands(images, weight, last)
    check(passes, made, 131, Geometry((1,) * axes, (1,) * axes, (1,) * axes, 1))
    check(passes, made, 0, Geometry((2,) * axes, (0,) * axes, (1,) * axes, 1), with_bias=False)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), axes=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_any_size_and_geometry(passes: Passes, data: Any, axes: int, seed: int) -> None:
    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=axes, max_size=axes)))

    its = Geometry(numbers(1, 3), numbers(0, 3), numbers(1, 3), 1)
    size, kernel = numbers(1, 9), numbers(1, 4)
    assume(min(its.places(size, kernel)) >= 1)
    count, channels, columns = (data.draw(st.integers(1, high)) for high in (3, 7, 20))
    made = operands(
        (count, channels, *size), (columns, channels, *kernel), data.draw(st.booleans()), seed
    )
    check(passes, made, data.draw(st.integers(0, 255)), its, data.draw(st.booleans()))


@pytest.mark.parametrize("code", [0, 255])
def test_the_largest_sums_fit(passes: Passes, code: int) -> None:
    # As many terms as float32 holds, and one more.
    for channels in (exact.MOST_TERMS, exact.MOST_TERMS + 1):
        codes = torch.full((1, channels, 2), code, dtype=torch.uint8)
        weight = torch.full((1, channels, 1), -128, dtype=torch.int8)
        its = Geometry((1,), (0,), (1,), 1)
        output = passes.convolve_integers(codes, weight, 255 - code, torch.ones(1), None, its)
        assert (output == float(np.float32(-128 * channels * (2 * code - 255)))).all()


def test_all_terms_but_one_more_would_not_be_exact_in_float32() -> None:
    assert exact.MOST_TERMS * 255 * 128 <= 2**24 < (exact.MOST_TERMS + 1) * 255 * 128


def test_kernels_that_transform_their_operands_are_not_asked(monkeypatch: Any) -> None:
    asked = []
    convolution = exact.convolution

    def watched(*arguments: Any) -> Tensor:
        asked.append(torch._C._get_nnpack_enabled())
        return convolution(*arguments)

    monkeypatch.setattr(exact, "convolution", watched)
    # So many images that torch takes NNPACK's kernels, where it has any.
    codes, weight, _, _ = operands((16, 24, 12, 12), (32, 24, 3, 3), last=False)
    its = Geometry((1, 1), (1, 1), (1, 1), 1)
    usual = exact.convolve(codes, 7, weight, its)
    before = torch._C._get_nnpack_enabled()
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        without = exact.convolve(codes, 7, weight, its)
    assert asked == [before, False]
    assert torch._C._get_nnpack_enabled() == before
    assert torch.equal(usual, without)


def test_plain_operations_convolve_groups(passes: Passes) -> None:
    codes, weight, scale, bias = operands((2, 6, 8), (4, 3, 3), last=False)
    its = Geometry((1,), (1,), (1,), 2)
    if passes.name == "native":
        with pytest.raises(QuantizationError, match="one group"):
            passes.convolve_integers(codes, weight, 9, scale, bias, its)
        return
    output = passes.convolve_integers(codes, weight, 9, scale, bias, its)
    one = its._replace(groups=1)
    halves = [
        expected(codes[:, inputs], weight[outputs], 9, scale[outputs], bias[outputs], one)
        for inputs, outputs in ((slice(3), slice(2)), (slice(3, 6), slice(2, 4)))
    ]
    assert same(output.numpy(), np.concatenate(halves, 1))


def test_several_threads_convolve_at_once(passes: Passes) -> None:
    formats = enumerate((False, True, False))
    made = [operands((2, 5, 9, 8), (20, 5, 3, 3), last, seed) for seed, last in formats]
    its = Geometry((1, 1), (1, 1), (1, 1), 1)
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(check, passes, one, 9, its) for one in made * 5]:
            future.result()


def test_the_result_is_on_the_device_of_the_codes(passes: Passes) -> None:
    codes, weight, scale, bias = operands((2, 3, 5, 5), (4, 3, 3, 3), last=False)
    its = Geometry((1, 1), (1, 1), (1, 1), 1)
    with torch.device("meta"):
        output = passes.convolve_integers(codes, weight, 7, scale, bias, its)
    assert same(output.numpy(), expected(codes, weight, 7, scale, bias, its))

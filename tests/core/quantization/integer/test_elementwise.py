"""Each pass against numpy, element by element in the order of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.quantization import quantize
from compression_manager.quantization.integer.passes import Passes
from dense_tensors import (
    bits,
    code_tensors,
    float_tensors,
    memory,
    rounded_to_bfloat16,
    same,
    values_like,
)

RANGES = [(0, 255), (0, 127), (-128, 127), (-127, 127), (-8, 7), (0, 15)]
# More than a thread takes at once, and no multiple of anything.
LONG = 3 * 32768 + 77


@st.composite
def grids(draw: st.DrawFn) -> tuple[np.float32, int, int, int]:
    low, high = draw(st.sampled_from(RANGES))
    scale = np.float32(draw(st.sampled_from([1.0, 0.25, 0.0123, 7.7, 1e-7, 3e37])))
    return scale, draw(st.integers(low, high)), low, high


def expected_codes(
    values: np.ndarray, inverse_scale: np.float32, zero_point: int, low: int, high: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    with np.errstate(over="ignore"):
        unclamped = np.rint(values * inverse_scale) + np.float32(zero_point)
    codes = np.clip(unclamped, low, high).astype(np.int8 if low < 0 else np.uint8)
    return codes, unclamped < low, unclamped > high


def check_quantize(
    passes: Passes, input: Tensor, grid: tuple[np.float32, int, int, int], *, looks: bool = True
) -> None:
    scale, zero_point, low, high = grid
    inverse_scale = np.float32(1) / scale
    expected, below, above = expected_codes(memory(input), inverse_scale, zero_point, low, high)
    wanted = {"below": looks or bool(below.any()), "above": looks or bool(above.any())}
    codes, clipped = passes.quantize(input, float(inverse_scale), zero_point, low, high, **wanted)
    assert codes.stride() == input.stride()
    assert np.array_equal(memory(codes), expected)
    assert memory(codes).dtype == expected.dtype
    assert torch.equal(codes, quantize(input, float(scale), zero_point, low, high))
    assert (clipped is not None) == any(wanted.values())
    assert np.array_equal(bits(clipped, input.numel()), below | above)


@settings(deadline=None, max_examples=100)
@given(input=float_tensors(), grid=grids(), looks=st.booleans())
def test_codes_and_clipped_elements_are_those_of_the_formula(
    passes: Passes, input: Tensor, grid: tuple[np.float32, int, int, int], looks: bool
) -> None:
    memory(input)[np.isnan(memory(input))] = 0.0
    check_quantize(passes, input, grid, looks=looks)


@pytest.mark.parametrize("size", [32768, LONG, 5 * LONG])
def test_threads_share_the_quantization_of_a_long_tensor(
    passes: Passes, threads: int, size: int
) -> None:
    last = torch.zeros(size)
    last[-1] = 100.0
    for low, high in ((0, 255), (-127, 127)):
        middle = (low + high) // 2
        for input, zero_point, looks in (
            (torch.randn(size) * 4, middle, True),  # half of the elements are outside
            (torch.randn(size) * 0.7, middle, True),  # few are
            (torch.randn(size).relu(), low, False),  # few are, and half are at the other end
            (-torch.randn(size).relu(), high, False),
            (last, middle, True),
        ):
            check_quantize(passes, input, (np.float32(0.02), zero_point, low, high), looks=looks)


@settings(deadline=None, max_examples=100)
@given(input=float_tensors(), grid=grids())
def test_finite_tensors_have_codes_and_others_have_none(
    passes: Passes, input: Tensor, grid: tuple[np.float32, int, int, int]
) -> None:
    assume(input.numel() > 0)
    scale, zero_point, low, high = grid
    inverse_scale, is_finite = np.float32(1) / scale, np.isfinite(memory(input)).all()
    codes = passes.quantize_finite(input, float(inverse_scale), zero_point, low, high)
    assert (codes is not None) == is_finite
    if codes is not None:
        expected, *_ = expected_codes(memory(input), inverse_scale, zero_point, low, high)
        assert codes.stride() == input.stride()
        assert np.array_equal(memory(codes), expected)
        assert memory(codes).dtype == expected.dtype


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
@pytest.mark.parametrize("position", [0, 1, 31, 32768, LONG - 1])
def test_one_value_that_is_not_finite_is_found_wherever_it_lies(
    passes: Passes, threads: int, value: float, position: int
) -> None:
    input = torch.randn(LONG)
    input[3] = torch.finfo(torch.float32).max  # as large as a finite one can be
    assert passes.quantize_finite(input, 1.0, 0, -128, 127) is not None
    input[position] = value
    assert passes.quantize_finite(input, 1.0, 0, -128, 127) is None


def test_channels_last_keeps_its_strides(passes: Passes) -> None:
    input = torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last)
    codes, _ = passes.quantize(input, 10.0, 0, -128, 127, below=True, above=True)
    output = passes.dequantize(codes, 0.1, 0, values_like(codes))
    total = passes.add_dequantized(input, codes, 0.1, 0)
    assert total.is_contiguous(memory_format=torch.channels_last)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert output.is_contiguous(memory_format=torch.channels_last)


@settings(deadline=None, max_examples=100)
@given(
    codes=code_tensors(np.int8, np.uint8),
    scale=st.sampled_from([1.0, 0.1, 1e-38, 5e35]),
    zero_point=st.integers(-128, 255),
)
def test_dequantized_values_are_rounded_once(
    passes: Passes, codes: Tensor, scale: float, zero_point: int
) -> None:
    single = np.float32(scale)
    output = passes.dequantize(codes, float(single), zero_point, values_like(codes))
    exact = (memory(codes).astype(np.float64) - zero_point) * np.float64(single)
    assert output.stride() == codes.stride()
    assert same(memory(output), exact.astype(np.float32))


@settings(deadline=None, max_examples=100)
@given(
    codes=code_tensors(np.int8, np.uint8),
    scale=st.sampled_from([1.0, 0.1, 1 / 3, 1e-38, 5e35]),
    zero_point=st.integers(-128, 255),
    seed=st.integers(0, 2**32),
)
def test_sums_are_rounded_after_the_dequantized_values_are(
    passes: Passes, codes: Tensor, scale: float, zero_point: int, seed: int
) -> None:
    single = np.float32(scale)
    addend = values_like(codes)
    memory(addend)[...] = np.random.default_rng(seed).standard_normal(codes.numel()) * scale
    output = passes.add_dequantized(addend, codes, float(single), zero_point)
    with np.errstate(over="ignore"):
        values = (memory(codes).astype(np.float32) - np.float32(zero_point)) * single
        expected = memory(addend) + values
    assert output.stride() == codes.stride()
    assert same(memory(output), expected)


@settings(deadline=None, max_examples=100)
@given(codes=code_tensors(np.int8, minimum_axes=1), seed=st.integers(0, 2**32))
def test_each_row_has_its_own_scale_in_any_memory_format(
    passes: Passes, codes: Tensor, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    scale = generator.random(codes.shape[0], dtype=np.float32)
    output = passes.dequantize_rows(codes, torch.from_numpy(scale), values_like(codes))
    shape = (-1, *[1] * (codes.dim() - 1))
    assert output.stride() == codes.stride()
    assert same(output.numpy(), codes.numpy().astype(np.float32) * scale.reshape(shape))


@settings(deadline=None, max_examples=100)
@given(
    codes=code_tensors(np.int8, np.uint8, minimum_axes=1),
    scale=st.sampled_from([1.0, 0.1, 1 / 3, 1e-38]),
    zero_point=st.integers(-128, 255),
)
def test_bfloat16_values_are_the_rounded_ones_of_float32(
    passes: Passes, codes: Tensor, scale: float, zero_point: int
) -> None:
    single = float(np.float32(scale))
    output = passes.dequantize(codes, single, zero_point, values_like(codes, torch.bfloat16))
    unrounded = passes.dequantize(codes, single, zero_point, values_like(codes))
    expected = rounded_to_bfloat16(memory(unrounded))
    assert output.dtype == torch.bfloat16
    assert output.stride() == codes.stride()
    assert same(memory(output.float()), expected)


@settings(deadline=None, max_examples=100)
@given(codes=code_tensors(np.int8, minimum_axes=1), seed=st.integers(0, 2**32))
def test_bfloat16_rows_are_the_rounded_ones_of_float32(
    passes: Passes, codes: Tensor, seed: int
) -> None:
    scale = torch.from_numpy(np.random.default_rng(seed).random(codes.shape[0], dtype=np.float32))
    output = passes.dequantize_rows(codes, scale, values_like(codes, torch.bfloat16))
    unrounded = passes.dequantize_rows(codes, scale, values_like(codes))
    expected = rounded_to_bfloat16(memory(unrounded))
    assert output.dtype == torch.bfloat16
    assert output.stride() == codes.stride()
    assert same(memory(output.float()), expected)


def test_bfloat16_values_are_rounded_half_to_even(passes: Passes) -> None:
    codes = torch.tensor([1, 3, 5], dtype=torch.int8)
    scale = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1.0])
    out = values_like(codes, torch.bfloat16)
    assert passes.dequantize(codes, 1.0, -256, out).tolist() == [256.0, 260.0, 260.0]
    rows = passes.dequantize_rows(torch.ones_like(codes), scale, out)
    assert rows.tolist() == [1.0, 1 + 2**-6, 1.0]


def test_bfloat16_values_that_are_not_finite(passes: Passes) -> None:
    codes = torch.tensor([-1, 0, 1], dtype=torch.int8)
    out = values_like(codes, torch.bfloat16)
    infinite = passes.dequantize(codes, 3.4e38, -1, out)
    assert infinite.tolist() == [0.0, float("inf"), float("inf")]
    assert passes.dequantize(codes, float("nan"), 0, out).isnan().all()
    scale = torch.tensor([float("inf"), float("nan"), 1.0])
    rows = passes.dequantize_rows(
        codes[:, None], scale, values_like(codes[:, None], torch.bfloat16)
    ).flatten()
    assert rows[0] == float("-inf")
    assert rows[1].isnan()
    assert rows[2] == 1


@settings(deadline=None, max_examples=100)
@given(gradient=float_tensors(), seed=st.integers(0, 2**32), share=st.sampled_from([0, 0.01, 0.5]))
def test_clipped_elements_lose_their_gradient_in_place(
    passes: Passes, gradient: Tensor, seed: int, share: float
) -> None:
    chosen = np.random.default_rng(seed).random(gradient.numel()) < share
    mask = torch.from_numpy(np.packbits(chosen, bitorder="little"))
    before, version = memory(gradient).copy(), gradient._version
    assert passes.clear_clipped(gradient, mask) is gradient
    assert same(memory(gradient), np.where(chosen, np.float32(0), before))
    assert gradient._version > version or not chosen.any()


@settings(deadline=None, max_examples=100)
@given(input=float_tensors())
def test_relu_keeps_a_bit_where_the_gradient_passes(passes: Passes, input: Tensor) -> None:
    output, positive, ends = passes.relu(input)
    values = memory(input)
    expected = ~(values <= 0)
    assert output.stride() == input.stride() or not input.numel()
    assert np.array_equal(memory(output), np.where(expected, values, 0), equal_nan=True)
    assert np.array_equal(bits(positive, input.numel()), expected)
    assert torch.equal(output.nan_to_num(7.0), input.relu().nan_to_num(7.0))
    if ends is not None and input.numel():
        kept = memory(output)  # whose minimum and maximum are NaN if one is
        assert np.array_equal(ends, (kept.min(), kept.max()), equal_nan=True)


@settings(deadline=None, max_examples=200)
@given(input=float_tensors())
def test_ends_are_the_smallest_and_the_largest_element(passes: Passes, input: Tensor) -> None:
    if input.numel():
        values = memory(input)  # whose minimum and maximum are NaN if one is
        assert np.array_equal(passes.ends(input), (values.min(), values.max()), equal_nan=True)


@pytest.mark.parametrize("special", ["-nan", "nan", "-inf", "inf", "-0.0"])
@pytest.mark.parametrize("place", [0, 63, 64, LONG - 1])
def test_one_special_element_of_many_is_an_end(
    passes: Passes, special: str, place: int, threads: int
) -> None:
    for sign in (1.0, -1.0):
        input = sign * torch.rand(LONG).add_(1.0)
        input[place] = float(special.strip("-"))
        if special.startswith("-"):
            input.neg_()
        values = input.numpy()
        assert np.array_equal(passes.ends(input), (values.min(), values.max()), equal_nan=True)


@settings(deadline=None, max_examples=100)
@given(gradient=float_tensors(), seed=st.integers(0, 2**32))
def test_relu_gradient_is_that_of_the_output_or_zero(
    passes: Passes, gradient: Tensor, seed: int
) -> None:
    chosen = np.random.default_rng(seed).random(gradient.numel()) < 0.5
    mask = torch.from_numpy(np.packbits(chosen, bitorder="little"))
    before = memory(gradient).copy()
    output = passes.relu_gradient(gradient, mask)
    assert output.stride() == gradient.stride()
    assert same(memory(output), np.where(chosen, before, np.float32(0)))
    assert same(memory(gradient), before)


def test_threads_share_every_pass_over_a_long_tensor(passes: Passes, threads: int) -> None:
    input = torch.randn(LONG)
    output, positive, ends = passes.relu(input)
    assert torch.equal(output, input.relu())
    assert ends in (None, (float(output.min()), float(output.max())))
    gradient = torch.randn(LONG)
    assert torch.equal(
        passes.relu_gradient(gradient, positive), torch.where(input > 0, gradient, 0)
    )
    expected = torch.where(input > 0, 0, gradient)
    assert torch.equal(passes.clear_clipped(gradient, positive), expected)
    for marked in ([0, 77, LONG - 1], [LONG - 1], []):  # as few as there are as a rule
        gradient, chosen = torch.randn(LONG), np.zeros(LONG, dtype=bool)
        chosen[marked] = True
        mask = torch.from_numpy(np.packbits(chosen, bitorder="little"))
        expected = torch.where(torch.from_numpy(chosen), 0, gradient)
        assert torch.equal(passes.clear_clipped(gradient, mask), expected)
    codes = torch.randint(-128, 128, (3, LONG), dtype=torch.int8)
    assert torch.equal(
        passes.dequantize(codes, 0.5, 3, values_like(codes)), (codes.float() - 3) * 0.5
    )
    scale = torch.rand(3)
    assert torch.equal(
        passes.dequantize_rows(codes, scale, values_like(codes)), codes * scale[:, None]
    )

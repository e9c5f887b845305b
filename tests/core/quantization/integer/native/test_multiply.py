"""Products by bfloat16 pieces against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer.native import NativePasses
from compression_manager.quantization.integer.torch_passes import TorchPasses
from dense_tensors import rounded_to_bfloat16

# Beyond one panel (64), tile (16), depth of a kernel (512), span (2048) and block of rows (256).
SHAPES = [(1, 1, 1), (17, 63, 65), (33, 513, 64), (300, 40, 130), (5, 2600, 7), (16, 512, 128)]


def make_factors(
    rows: int, depth: int, columns: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    limits = torch.iinfo(dtype)
    size = (depth, columns)
    codes = torch.randint(limits.min, limits.max + 1, size, generator=generator, dtype=dtype)
    return torch.randn(rows, depth, generator=generator), codes


def multiply(
    passes: NativePasses,
    left: Tensor,
    right: Tensor,
    zero_point: int,
    pieces: int,
    transposed: bool,
) -> Tensor:
    if transposed:
        return passes.multiply_transposed(left.t().contiguous(), right, zero_point, pieces)
    return passes.multiply(left, right, zero_point, pieces)


def largest_error(output: Tensor, left: np.ndarray, right: Tensor, zero_point: int) -> float:
    """The largest error, relative to the sum of the magnitudes of the terms."""
    integers = right.numpy().astype(np.float64) - zero_point
    error = np.abs(output.double().numpy() - left.astype(np.float64) @ integers)
    return float((error / (np.abs(left).astype(np.float64) @ np.abs(integers) + 1e-300)).max())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "zero_point"), [(torch.int8, 0), (torch.uint8, 131)])
def test_three_pieces_have_the_error_of_float32(
    passes: NativePasses,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    zero_point: int,
    transposed: bool,
) -> None:
    left, right = make_factors(*shape, dtype)
    output = multiply(passes, left, right, zero_point, 3, transposed)
    assert output.is_contiguous()
    assert largest_error(output, left.numpy(), right, zero_point) < 3e-7


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_one_piece_rounds_the_left_factor(
    passes: NativePasses, shape: tuple[int, int, int], transposed: bool
) -> None:
    left, right = make_factors(*shape, torch.uint8)
    output = multiply(passes, left, right, 77, 1, transposed)
    assert largest_error(output, rounded_to_bfloat16(left.numpy()), right, 77) < 3e-7


def test_one_piece_rounds_half_to_even(passes: NativePasses) -> None:
    left = torch.tensor([[1 + 2**-8], [1 + 3 * 2**-8], [-1 - 3 * 2**-8]])
    output = passes.multiply(left, torch.ones(1, 1, dtype=torch.int8), 0, 1)
    assert output.flatten().tolist() == [1.0, 1 + 2**-6, -1 - 2**-6]


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(0, 40),
    depth=st.integers(0, 70),
    columns=st.integers(0, 70),
    zero_point=st.integers(-128, 127),
    pieces=st.sampled_from([1, 3]),
    transposed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_size_and_zero_point(
    passes: NativePasses,
    rows: int,
    depth: int,
    columns: int,
    zero_point: int,
    pieces: int,
    transposed: bool,
    seed: int,
) -> None:
    left, right = make_factors(rows, depth, columns, torch.int8, seed)
    output = multiply(passes, left, right, zero_point, pieces, transposed)
    reference = left.numpy() if pieces == 3 else rounded_to_bfloat16(left.numpy())
    assert output.shape == (rows, columns)
    if output.numel() > 0:
        assert largest_error(output, reference, right, zero_point) < 3e-7


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_share_the_rows(passes: NativePasses, threads: int, transposed: bool) -> None:
    left, right = make_factors(130, 600, 90, torch.int8)
    output = multiply(passes, left, right, 3, 3, transposed)
    assert largest_error(output, left.numpy(), right, 3) < 3e-7


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pieces", [1, 3])
def test_values_that_are_not_finite_stay_in_their_row(
    passes: NativePasses, pieces: int, transposed: bool
) -> None:
    left, right = torch.ones(4, 40), torch.ones(40, 70, dtype=torch.uint8)
    left[1, 3], left[2, 39] = float("nan"), float("inf")
    output = multiply(passes, left, right, 0, pieces, transposed)
    assert output[1].isnan().all()
    assert (output[2] == float("inf")).all()
    assert (output[[0, 3]] == 40).all()


def test_three_pieces_hold_the_largest_floats(passes: NativePasses) -> None:
    left = torch.full((1, 1), torch.finfo(torch.float32).max)
    output = passes.multiply(left, torch.ones(1, 1, dtype=torch.int8), 0, 3)
    assert output.item() == left.item()


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_scale_of_the_left_columns_is_a_product_of_its_own(
    passes: NativePasses, shape: tuple[int, int, int], pieces: int
) -> None:
    left, right = make_factors(*shape, torch.int8)
    scale = torch.rand(shape[1])
    expected = passes.multiply(left * scale, right, 5, pieces)
    assert torch.equal(passes.multiply(left, right, 5, pieces, scale), expected)
    assert not torch.equal(passes.multiply(left, right, 5, pieces), expected)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_factor_multiplies_the_final_result(
    passes: NativePasses, shape: tuple[int, int, int], pieces: int
) -> None:
    left, right = make_factors(*shape, torch.int8)
    left, factor = left.t().contiguous(), float(np.float32(0.0123))
    expected = passes.multiply_transposed(left, right, 5, pieces).mul_(factor)
    assert torch.equal(passes.multiply_transposed(left, right, 5, pieces, factor), expected)


def test_plain_operations_take_scale_and_factor() -> None:
    left, right = make_factors(9, 20, 11, torch.int8)
    scale, plain = torch.rand(20), TorchPasses()
    expected = plain.multiply(left * scale, right, 3, 1)
    assert torch.equal(plain.multiply(left, right, 3, 1, scale), expected)
    left = left.t().contiguous()
    expected = plain.multiply_transposed(left, right, 3, 1) * 0.25
    assert torch.equal(plain.multiply_transposed(left, right, 3, 1, 0.25), expected)


def test_factors_may_have_any_strides(passes: NativePasses) -> None:
    left, right = make_factors(9, 20, 11, torch.int8)
    expected = passes.multiply(left, right, 0, 3)
    assert torch.equal(passes.multiply(left.t().contiguous().t(), right, 0, 3), expected)
    assert torch.equal(passes.multiply(left, right.t().contiguous().t(), 0, 3), expected)


def test_what_does_not_fit_is_refused(passes: NativePasses) -> None:
    left, right = make_factors(3, 4, 5, torch.uint8)
    with pytest.raises(QuantizationError, match="as many columns as right has rows"):
        passes.multiply(left.t(), right, 0, 1)
    with pytest.raises(QuantizationError, match="as many rows as right has rows"):
        passes.multiply_transposed(left, right, 0, 1)
    with pytest.raises(QuantizationError, match="pieces is 1 or 3, got 2"):
        passes.multiply(left, right, 0, 2)
    with pytest.raises(QuantizationError, match="between 0 and 255, got 256"):
        passes.multiply(left, right, 256, 1)
    with pytest.raises(QuantizationError, match="scale has 4 elements"):
        passes.multiply(left, right, 0, 1, torch.ones(3))
    with pytest.raises(QuantizationError, match="right one of int8 or uint8"):
        passes.multiply(left, right.float(), 0, 1)

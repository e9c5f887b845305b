"""Exact products of integers as real numbers, against numpy's 64-bit integers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compression_manager.errors import QuantizationError
from compression_manager.quantization.integer import torch_passes
from compression_manager.quantization.integer.cpu_features import CpuFeatures, cpu_features
from compression_manager.quantization.integer.native import NativePasses
from compression_manager.quantization.integer.torch_passes import TorchPasses
from dense_tensors import same

# Rows, depth, columns: beyond one panel (64), unit (4), tile (16 by 64) and block of rows (48).
SHAPES = [(1, 1, 1), (17, 63, 65), (33, 513, 64), (300, 40, 130), (5, 2600, 7), (7, 36, 90)]

Factors = tuple[Tensor, Tensor, Tensor, Tensor]


def make_factors(rows: int, depth: int, columns: int, seed: int = 0, largest: int = 127) -> Factors:
    generator = np.random.default_rng(seed)
    codes = generator.integers(0, 256, (rows, depth), dtype=np.uint8)
    weight = generator.integers(-largest - 1, largest + 1, (columns, depth), dtype=np.int8)
    scale = generator.random(columns, dtype=np.float32) * np.float32(1e-3)
    bias = generator.normal(size=columns).astype(np.float32)
    tensors = [torch.from_numpy(array) for array in (codes, weight, scale, bias)]
    return tensors[0], tensors[1], tensors[2], tensors[3]


def expected(factors: Factors, zero_point: int, with_bias: bool) -> np.ndarray:
    """What numpy computes: exact integers, then three roundings to float32."""
    codes, weight, scale, bias = (tensor.numpy() for tensor in factors)
    sums = (codes.astype(np.int64) - zero_point) @ weight.astype(np.int64).T
    output = sums.astype(np.float32) * scale
    return output + bias if with_bias else output


def check(
    passes: NativePasses | TorchPasses, factors: Factors, zero_point: int, with_bias: bool
) -> None:
    codes, weight, scale, bias = factors
    output = passes.multiply_integers(codes, weight, zero_point, scale, bias if with_bias else None)
    assert output.is_contiguous()
    assert same(output.numpy(), expected(factors, zero_point, with_bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact_and_rounded_three_times(
    passes: NativePasses, shape: tuple[int, int, int], with_bias: bool
) -> None:
    check(passes, make_factors(*shape), 131, with_bias)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 40),
    depth=st.integers(0, 200),
    columns=st.integers(0, 140),
    zero_point=st.integers(0, 255),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_size_and_zero_point(
    passes: NativePasses,
    rows: int,
    depth: int,
    columns: int,
    zero_point: int,
    with_bias: bool,
    seed: int,
) -> None:
    factors = make_factors(rows, depth, columns, seed)
    check(passes, factors, zero_point, with_bias)
    check(TorchPasses(), factors, zero_point, with_bias)


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 1), (0, 3)])
def test_axes_before_the_last_stay(passes: NativePasses, shape: tuple[int, ...]) -> None:
    factors = make_factors(math.prod(shape), 20, 7)
    codes, weight, scale, bias = factors
    rows = torch.from_numpy(expected(factors, 131, True))
    for one in (passes, TorchPasses()):
        output = one.multiply_integers(codes.view(*shape, 20), weight, 131, scale, bias)
        assert output.is_contiguous()
        assert torch.equal(output, rows.view(*shape, 7))


@pytest.mark.parametrize("zero_point", [0, 255])
def test_the_largest_sums_fit(passes: NativePasses, zero_point: int) -> None:
    codes = torch.full((2, 65793), 255 - zero_point, dtype=torch.uint8)
    weight = torch.full((3, 65793), -128, dtype=torch.int8)
    sign = -1 if zero_point == 0 else 1
    for one in (passes, TorchPasses()):
        output = one.multiply_integers(codes, weight, zero_point, torch.ones(3), None)
        assert (output == sign * float(np.float32(65793 * 255 * 128))).all()


def test_threads_share_columns_and_rows(passes: NativePasses, threads: int) -> None:
    check(passes, make_factors(700, 130, 200), 3, True)


def test_a_row_whose_scale_is_not_a_number_is_one(passes: NativePasses) -> None:
    codes, weight, scale, _ = make_factors(4, 30, 70)
    scale[5] = float("nan")
    output = passes.multiply_integers(codes, weight, 9, scale, None)
    assert output[:, 5].isnan().all()
    assert output.isnan().sum() == 4


def test_plain_operations_multiply_8_bits_where_that_is_exact(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_passes, "cpu_features", lambda: CpuFeatures(vnni=True, amx=False))
    # So small that the sums are exact on a CPU without VNNI, too.
    check(TorchPasses(), make_factors(32, 64, 48, largest=15), 131, True)


@pytest.mark.parametrize("shape", [(1, 40, 30), (9, 1, 30), (9, 40, 1), (1, 1, 1)])
def test_strides_mean_nothing_where_a_size_is_one(
    passes: NativePasses, shape: tuple[int, int, int]
) -> None:
    codes, weight, scale, bias = make_factors(*shape)
    factors = _with_stride_zero(codes), _with_stride_zero(weight), scale, bias
    for _ in range(3):  # what lies in fresh memory may be right by chance
        check(passes, factors, 3, True)
        check(TorchPasses(), factors, 3, True)


def test_plain_operations_take_any_strides() -> None:
    codes, weight, scale, bias = make_factors(30, 40, 30)
    for order in (lambda matrix: matrix, lambda matrix: matrix.t().contiguous().t()):
        check(TorchPasses(), (order(codes), order(weight), scale, bias), 3, True)


def _with_stride_zero(matrix: Tensor) -> Tensor:
    sizes = zip(matrix.shape, matrix.stride(), strict=True)
    return matrix.as_strided(matrix.shape, [stride if size > 1 else 0 for size, stride in sizes])


def test_the_result_is_float32_whatever_the_default_is(passes: NativePasses) -> None:
    codes, weight, scale, bias = make_factors(4, 30, 70)
    default = torch.get_default_dtype()
    try:
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            for one in (passes, TorchPasses()):
                output = one.multiply_integers(codes, weight, 9, scale, bias)
                assert output.dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_the_instructions_are_the_best_that_there_are(passes: NativePasses) -> None:
    features, capability = cpu_features(), torch.backends.cpu.get_cpu_capability()
    best = {"AVX2": "AVX2", "AVX512": "VNNI" if features.vnni else None}.get(capability)
    if features.amx:
        best = "AMX"
    assert passes.supports_integers() == (best is not None)
    if best is not None:
        assert f"the native {best} product" in passes.integer_kernel(torch.device("cpu"))


def test_plain_operations_leave_integers_to_others() -> None:
    assert not TorchPasses().supports_integers()


def test_what_does_not_fit_is_refused(passes: NativePasses) -> None:
    codes, weight, scale, bias = make_factors(3, 4, 5)
    multiply = passes.multiply_integers
    with pytest.raises(QuantizationError, match="codes is a dense uint8"):
        multiply(codes.view(torch.int8), weight, 0, scale, bias)
    with pytest.raises(QuantizationError, match="end in its number of columns"):
        multiply(codes, weight[:, :3].contiguous(), 0, scale, bias)
    with pytest.raises(QuantizationError, match="are contiguous"):
        multiply(codes, weight.t().contiguous().t(), 0, scale, bias)
    with pytest.raises(QuantizationError, match="between 0 and 255, got 256"):
        multiply(codes, weight, 256, scale, bias)
    with pytest.raises(QuantizationError, match="scale has 5 elements"):
        multiply(codes, weight, 0, scale[:4], bias)
    with pytest.raises(QuantizationError, match="bias has 5 elements"):
        multiply(codes, weight, 0, scale, bias[:4])
    with pytest.raises(QuantizationError, match="up to 65793 products"):
        multiply(
            torch.zeros(1, 65794, dtype=torch.uint8), torch.zeros(1, 65794, dtype=torch.int8), 0,
            scale[:1], None,
        )  # fmt: skip

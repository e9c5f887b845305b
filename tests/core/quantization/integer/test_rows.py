"""Weights, one scale for each row, against numpy and against the scheme's own parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression_manager.quantization import QuantizationScheme, quantize
from compression_manager.quantization.arithmetic.parameters import compute_qparams
from compression_manager.quantization.integer.passes import Passes
from dense_tensors import LARGEST, SPECIAL, same

EPSILON = np.float32(2.0**-23)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 150))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    weight = generator.normal(size=(rows, columns)).astype(np.float32)
    weight *= np.float32(10.0) ** generator.integers(-9, 30, size=(rows, 1)).astype(np.float32)
    chosen = generator.random(weight.shape) < draw(st.sampled_from([0.0, 0.002, 0.05]))
    weight[chosen] = generator.choice(SPECIAL, size=int(chosen.sum()))
    return weight


def expected(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.abs(weight).max(1, initial=0)
    scale = np.maximum(largest / np.float32(127), EPSILON)
    with np.errstate(invalid="ignore", over="ignore"):
        # Rounding may lift the outermost level above float32's maximum.
        limit = np.float32(float(np.finfo(np.float32).max) * (1 - 2**-22) / 127)
        scale = np.where(np.isfinite(largest), np.minimum(scale, limit), np.float32(np.nan))
        codes = np.clip(np.rint(weight * (np.float32(1) / scale)[:, None]), -127, 127)
    return np.nan_to_num(codes, nan=0.0).astype(np.int8), scale


@settings(deadline=None, max_examples=100)
@given(weight=weights())
def test_rows_have_the_integers_and_scales_of_the_formula(
    passes: Passes, weight: np.ndarray
) -> None:
    codes, scale = passes.quantize_rows(torch.from_numpy(weight))
    expected_codes, expected_scale = expected(weight)
    assert same(scale.numpy(), expected_scale)
    assert np.array_equal(codes.numpy(), expected_codes)


@settings(deadline=None, max_examples=100)
@given(weight=weights())
def test_rows_have_the_parameters_of_a_weight_quantizer(passes: Passes, weight: np.ndarray) -> None:
    tensor = torch.from_numpy(weight)
    scheme = QuantizationScheme(bits=8, symmetric=True, granularity="channel", axis=0)
    low, high = tensor.amin(1), tensor.amax(1)
    reference, zero_point = compute_qparams(low, high, scheme)
    codes, scale = passes.quantize_rows(tensor)
    assert same(scale.numpy(), reference.numpy())
    expected_codes = quantize(tensor, reference, zero_point, -127, 127, axis=0)
    assert torch.equal(codes, expected_codes)


@settings(deadline=None, max_examples=100)
@given(weight=weights())
def test_values_are_written_along_with_the_integers(passes: Passes, weight: np.ndarray) -> None:
    tensor = torch.from_numpy(weight)
    values = torch.full_like(tensor, 7.0)
    codes, scale = passes.quantize_rows(tensor, values)
    expected_codes, expected_scale = expected(weight)
    assert same(scale.numpy(), expected_scale)
    assert np.array_equal(codes.numpy(), expected_codes)
    assert same(values.numpy(), codes.numpy().astype(np.float32) * scale.numpy()[:, None])


@pytest.mark.parametrize(
    ("shape", "format"),
    [
        ((5,), torch.contiguous_format),
        ((6, 3, 4), torch.contiguous_format),
        ((6, 3, 4, 2), torch.channels_last),
        ((6, 3, 2, 4, 2), torch.channels_last_3d),
    ],
)
def test_rows_of_any_shape_keep_their_memory_format(
    passes: Passes, shape: tuple[int, ...], format: torch.memory_format
) -> None:
    weight = torch.randn(shape).contiguous(memory_format=format)
    values = torch.empty_like(weight)
    codes, scale = passes.quantize_rows(weight, values)
    assert codes.stride() == weight.stride()
    expected_codes, expected_scale = expected(weight.reshape(shape[0], -1).numpy())
    assert np.array_equal(scale.numpy(), expected_scale)
    assert np.array_equal(codes.reshape(shape[0], -1).numpy(), expected_codes)
    assert torch.equal(values, codes * scale.view(-1, *[1] * (len(shape) - 1)))


def test_the_scale_of_the_largest_float_is_cut(passes: Passes) -> None:
    weight = np.array([[LARGEST], [-LARGEST], [np.float32(3.4e38)]])
    codes, scale = passes.quantize_rows(torch.from_numpy(weight))
    assert scale[0] == scale[1] < LARGEST / np.float32(127)
    assert same(scale.numpy(), expected(weight)[1])
    assert (codes.float() * scale[:, None]).isfinite().all()


def test_threads_share_the_rows(passes: Passes, threads: int) -> None:
    weight = np.random.default_rng(0).normal(size=(301, 517)).astype(np.float32)
    codes, scale = passes.quantize_rows(torch.from_numpy(weight))
    expected_codes, expected_scale = expected(weight)
    assert np.array_equal(scale.numpy(), expected_scale)
    assert np.array_equal(codes.numpy(), expected_codes)

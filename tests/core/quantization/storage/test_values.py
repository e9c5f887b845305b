"""What is stored, and what the model computes with: against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

from compression_manager.errors import QuantizationError
from compression_manager.quantization import (
    HistogramCalibration,
    MinMaxCalibration,
    MovingAverageCalibration,
    PercentileCalibration,
    QuantizationScheme,
    Quantizer,
)
from compression_manager.quantization.arithmetic.ranges import range_shape
from compression_manager.quantization.storage.weight import WeightFormat
from integer_weights import numpy_grid, numpy_read

SCHEMES = [
    QuantizationScheme(),
    QuantizationScheme(symmetric=False),
    QuantizationScheme(granularity="channel"),
    QuantizationScheme(symmetric=False, granularity="channel", axis=-1),
    QuantizationScheme(granularity="group", group_size=4),
    QuantizationScheme(symmetric=False, granularity="group", group_size=3),
    *(QuantizationScheme(bits, granularity="group", group_size=5) for bits in range(2, 8)),
    *(QuantizationScheme(bits, symmetric=False, granularity="channel") for bits in range(1, 8)),
    QuantizationScheme(12),
    QuantizationScheme(16, symmetric=False, granularity="channel"),
    QuantizationScheme(24),
]


def weights(min_dims=2):
    shapes = hnp.array_shapes(min_dims=min_dims, max_dims=4, min_side=1, max_side=7)
    return hnp.arrays(np.float32, shapes, elements=st.floats(-100, 100, width=32))


def module_with(weight):
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor(weight))
    return module


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@settings(deadline=None, max_examples=20)
@given(weight=weights())
def test_stored_integers_and_computed_values_equal_numpy(scheme, weight):
    module = Quantizer(scheme).quantize_weights(module_with(weight))
    state = module.state_dict()
    code, scale, zero_point = numpy_read(state, "weight", weight.shape, scheme)
    expected = numpy_grid(weight, scheme)
    np.testing.assert_array_equal(scale, expected[1])
    np.testing.assert_array_equal(zero_point, expected[2])
    np.testing.assert_array_equal(code, expected[0])
    exact = (code - zero_point).astype(np.float32) * scale
    assert module.weight.dtype == torch.float32
    np.testing.assert_array_equal(module.weight.numpy(), exact.astype(np.float32))


@pytest.mark.parametrize(
    ("scheme", "integers", "zero_points"),
    [
        (QuantizationScheme(), torch.int8, None),
        (QuantizationScheme(symmetric=False), torch.int8, torch.int8),
        (QuantizationScheme(symmetric=False, signed=False), torch.uint8, torch.uint8),
        (QuantizationScheme(signed=False), torch.uint8, None),
        (QuantizationScheme(4, symmetric=False), torch.uint8, torch.int8),
        (QuantizationScheme(9), torch.int16, None),
        (QuantizationScheme(16, symmetric=False), torch.int16, torch.int16),
        (QuantizationScheme(16, symmetric=False, signed=False), torch.int32, torch.int32),
        (QuantizationScheme(32, symmetric=False), torch.int32, torch.int32),
        (QuantizationScheme(32, symmetric=False, signed=False), torch.int64, torch.int64),
    ],
    ids=str,
)
def test_smallest_types_hold_integers_and_zero_points(scheme, integers, zero_points):
    state = Quantizer(scheme).quantize_weights(nn.Linear(6, 5)).state_dict()
    assert state["weight"].dtype == integers
    assert state["weight_scale"].dtype == torch.float32
    found = state.get("weight_zero_point")
    assert (None if found is None else found.dtype) == zero_points


@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(32),
        QuantizationScheme(32, symmetric=False, signed=False),
        QuantizationScheme(26, granularity="channel"),
    ],
    ids=str,
)
def test_wide_integers_lose_no_more_than_float32_does(scheme):
    linear = nn.Linear(40, 30)
    exact = linear.weight.detach().clone()
    Quantizer(scheme).quantize_weights(linear)
    torch.testing.assert_close(linear.weight, exact, rtol=3e-7, atol=exact.abs().max() * 2**-24)


def test_one_bit_and_unsigned_symmetric_values():
    weight = np.array([[0.4, -0.25], [0.1, 1.0]], np.float32)
    one = Quantizer(QuantizationScheme(1)).quantize_weights(module_with(weight))
    assert one.weight.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert one.state_dict()["weight"].tolist() == [0b1000]
    four = Quantizer(QuantizationScheme(4, signed=False)).quantize_weights(module_with(weight))
    # The range is 1 to 15 around the zero point 8, which takes no space; 1 is stored as 0.
    assert "weight_zero_point" not in four.state_dict()
    np.testing.assert_allclose(four.weight, np.round(weight * 7) / 7, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_weights_of_other_dtypes_come_back_in_theirs(dtype):
    linear = nn.Linear(6, 5).to(dtype)
    exact = linear.weight.detach().clone()
    Quantizer(QuantizationScheme(granularity="channel")).quantize_weights(linear)
    assert linear.weight.dtype == dtype
    assert linear.state_dict()["weight_scale"].dtype == torch.float32
    step = linear.state_dict()["weight_scale"].to(torch.float64).unsqueeze(1)
    epsilon = torch.finfo(dtype).eps * exact.abs()
    assert ((linear.weight - exact).abs() <= step * 0.501 + epsilon).all()
    assert linear(torch.randn(2, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "calibration",
    [PercentileCalibration(90.0), HistogramCalibration(), MovingAverageCalibration()],
    ids=lambda item: type(item).__name__,
)
@pytest.mark.parametrize(
    "scheme",
    [
        QuantizationScheme(4, granularity="channel"),
        QuantizationScheme(4, symmetric=False),
        QuantizationScheme(3, granularity="group", group_size=16),
    ],
    ids=str,
)
def test_calibrations_choose_the_range(scheme, calibration):
    torch.manual_seed(0)
    weight = torch.randn(6, 40)
    weight[:, 3] = 9.0
    scales = {}
    for name, each in {"chosen": calibration, "min_max": MinMaxCalibration()}.items():
        module = Quantizer(scheme, each).quantize_weights(module_with(weight.numpy()))
        scales[name] = module.state_dict()["weight_scale"]
    if isinstance(calibration, MovingAverageCalibration):
        assert torch.equal(scales["chosen"], scales["min_max"])
    elif isinstance(calibration, PercentileCalibration):
        assert (scales["chosen"] <= scales["min_max"]).all()
        assert scales["chosen"].min() < 0.5 * scales["min_max"].max()
    else:
        assert (scales["chosen"] <= scales["min_max"]).all()


def test_percentile_is_that_of_numpy():
    torch.manual_seed(0)
    weight = torch.randn(4, 1000)
    scheme = QuantizationScheme(4, granularity="channel")
    module = Quantizer(scheme, PercentileCalibration(95.0)).quantize_weights(
        module_with(weight.numpy())
    )
    expected = np.quantile(np.abs(weight.numpy()).astype(np.float64), 0.95, axis=1) / 7
    np.testing.assert_allclose(module.state_dict()["weight_scale"], expected, rtol=1e-6)
    # What lies beyond is clipped to the last level.
    np.testing.assert_allclose(module.weight.abs().amax(1), expected * 7, rtol=1e-6)


def test_squared_error_clips_an_outlier_to_less_noise():
    torch.manual_seed(0)
    weight = torch.randn(1, 1000)
    weight[0, 0] = 8.0
    noise = {}
    for name, calibration in (("min_max", MinMaxCalibration()), ("error", HistogramCalibration())):
        module = module_with(weight.numpy())
        Quantizer(QuantizationScheme(4), calibration).quantize_weights(module)
        noise[name] = (module.weight - weight).square().sum().item()
    assert noise["error"] < 0.7 * noise["min_max"]


@pytest.mark.parametrize("width", [3, 4])  # of 4 bits, rows that begin within a byte and with one
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"granularity": "channel", "axis": 0},
        {"granularity": "channel", "axis": 1},
        {"granularity": "group", "group_size": 2},
    ],
    ids=str,
)
def test_rows_are_those_of_the_whole_matrix(options, bits, width):
    scheme = QuantizationScheme(bits, symmetric=False, **options)
    stored = WeightFormat(scheme, (5, width))
    scales = torch.rand(range_shape(scheme, stored.shape)) + 0.1
    tensors = stored.encode(torch.randn(stored.shape), scales, torch.ones_like(scales))
    rows = torch.tensor([4, 0, 4])
    whole = stored.decode(tensors, torch.float32)
    assert torch.equal(stored.decode_rows(tensors, rows, torch.float32), whole[rows])


def test_one_zero_point_outside_of_the_range_is_refused():
    scheme = QuantizationScheme(symmetric=False, granularity="channel")
    zero_points = torch.tensor([0, scheme.quant_max + 1])
    with pytest.raises(QuantizationError, match=f"got {scheme.quant_max + 1}"):
        WeightFormat(scheme, (2, 3)).encode(torch.zeros(2, 3), torch.ones(2), zero_points)
